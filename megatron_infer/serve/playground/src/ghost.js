/** The suggestion in the editor: shown after the cursor, kept while the user types along, accepted or dismissed. */

import {Prec, StateEffect, StateField} from "@codemirror/state"
import {Decoration, EditorView, keymap, WidgetType} from "@codemirror/view"

const show = StateEffect.define()

const LEAVING_MS = 10_000 // How long after Escape the Tab key leaves the editor.
const WORD = /^\s*(?:[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]+)/u

/** {from: where it was asked for, typed: how much of it is in the document already, answer}, or null. */
const ghost = StateField.define({
  create: () => null,
  update(value, transaction) {
    for (const effect of transaction.effects) if (effect.is(show)) return effect.value
    if (value === null || !(transaction.docChanged || transaction.selection)) return value
    const typed = typedAlong(value, transaction)
    return typed === null || typed === value.answer.text.length ? null : {...value, typed}
  },
  provide: (field) => EditorView.decorations.from(field, decorate),
})

/** How much of the answer the document holds after `transaction`; null where it does something else. */
function typedAlong({from, typed, answer}, transaction) {
  const head = transaction.newSelection.main
  const length = head.head - from
  if (!head.empty || length < typed) return null
  const outside = transaction.newDoc.length - length !== transaction.startState.doc.length - typed
  if (outside || transaction.newDoc.sliceString(from, head.head) !== answer.text.slice(0, length)) return null
  let elsewhere = false
  transaction.changes.iterChangedRanges((start, end) => {
    elsewhere ||= start < from || end > from + typed
  })
  return elsewhere ? null : length
}

class GhostWidget extends WidgetType {
  constructor(pieces) {
    super()
    this.pieces = pieces
  }

  get text() {
    return this.pieces.map(({text}) => text).join("")
  }

  get lineBreaks() {
    return this.text.split("\n").length - 1
  }

  eq(other) {
    const same = ({text, token}, index) => text === other.pieces[index].text && token === other.pieces[index].token
    return other.pieces.length === this.pieces.length && this.pieces.every(same)
  }

  toDOM() {
    const dom = document.createElement("span")
    dom.className = "ghost"
    dom.setAttribute("aria-hidden", "true") // The status line says it to screen readers.
    for (const {text, token} of this.pieces) {
      const part = dom.appendChild(document.createElement("span"))
      part.textContent = text
      if (token !== null) part.dataset.token = token
    }
    return dom
  }

  ignoreEvent() {
    return true
  }
}

function decorate(value) {
  if (value === null) return Decoration.none
  const widget = new GhostWidget(value.answer.pieces(value.typed))
  return Decoration.set(Decoration.widget({widget, side: 1}).range(value.from + value.typed))
}

/** The rest of the suggestion; "" where there is none. */
export function ghostText(state) {
  const value = state.field(ghost)
  return value === null ? "" : value.answer.text.slice(value.typed)
}

/** Where the suggestion began and what of it was typed already, or null. */
export function ghostPlace(state) {
  const value = state.field(ghost)
  return value && {from: value.from, typed: value.typed}
}

/** Show `answer` from `place` on. One that does not begin with what was typed since, or adds nothing, is not shown. */
export function showGhost(view, {from, typed}, answer) {
  const fits = answer.text.startsWith(view.state.sliceDoc(from, from + typed)) && answer.text.length > typed
  view.dispatch({effects: show.of(fits ? {from, typed, answer} : null)})
  return fits
}

/** Take the suggestion away; whether there was one. */
export function dismissGhost(view) {
  if (view.state.field(ghost) === null) return false
  view.dispatch({effects: show.of(null)})
  return true
}

function insert(view, text) {
  if (!text) return false
  const {head} = view.state.selection.main
  view.dispatch({
    changes: {from: head, insert: text},
    selection: {anchor: head + text.length},
    userEvent: "input.complete",
    scrollIntoView: true,
  })
  return true
}

export const acceptGhost = (view) => insert(view, ghostText(view.state))

export function acceptWord(view) {
  const text = ghostText(view.state)
  return insert(view, WORD.exec(text)?.[0] ?? text)
}

/** The suggestion as an extension. Each command returns whether it did something, else the key keeps its meaning. */
export function ghostExtension(commands) {
  const leave = (view) => {
    commands.dismiss(view)
    view.setTabFocusMode(LEAVING_MS)
    return true
  }
  const keys = keymap.of([
    {key: "Tab", run: acceptGhost},
    {key: "Ctrl-ArrowRight", mac: "Alt-ArrowRight", run: acceptWord},
    {key: "Escape", run: leave},
    {key: "Alt-]", run: commands.next},
    {key: "Alt-[", run: commands.previous},
    {key: "Alt-\\", run: commands.suggest},
  ])
  const stay = EditorView.domEventHandlers({blur: (event, view) => view.setTabFocusMode(false)})
  return [ghost, Prec.highest(keys), stay]
}
