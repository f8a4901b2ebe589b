/** The page: an editor with suggestions, the controls around it, and what is said about them. */

import {defaultKeymap, history, historyKeymap, indentWithTab} from "@codemirror/commands"
import {bracketMatching, indentOnInput, indentUnit} from "@codemirror/language"
import {Compartment, EditorState} from "@codemirror/state"
import {drawSelection, EditorView, highlightActiveLine, keymap, lineNumbers} from "@codemirror/view"

import {Answer} from "./answer.js"
import {Asker} from "./asker.js"
import {curl, dialects} from "./curl.js"
import {acceptGhost, acceptWord, dismissGhost, ghostExtension, ghostPlace, ghostText, showGhost} from "./ghost.js"
import {infill, infillAll, modelName, wantsKey} from "./infill.js"
import {languageOfPath, languages} from "./languages.js"
import {hideCard, showFacts, startPanel} from "./panel.js"
import {theme} from "./theme.js"

const NUM_PROBABILITIES = 5
const NUM_ALTERNATIVES = 4
const SLOW_MS = 1000
const KEY = "megatron_infer.api_key" // In this tab's sessionStorage only.
const SESSION = Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16)).join("-")

const byId = (id) => document.getElementById(id)
const controls = ["path", "language", "ending", "limit", "probabilities"].map(byId)
const [path, language, ending, limit, probabilities] = controls

const grammar = new Compartment()
const asker = new Asker(sayProblem)
let answers = [] // For the place of the suggestion; the one shown, and others.
let shown = 0
let needsKey = false

// What is said.

/** text: to be seen. spoken: what screen readers say after it. */
function say(text, {spoken = "", isProblem = false} = {}) {
  const status = byId("status")
  status.classList.toggle("problem", isProblem)
  const hidden = document.createElement("span")
  hidden.className = "spoken"
  hidden.textContent = spoken
  status.replaceChildren(text, hidden)
}

function sayProblem(error) {
  if (error.status === undefined) throw error // A fault of this page: the console has it.
  if (error.status === 401) {
    byId("key-form").hidden = false
    const key = sessionStorage.getItem(KEY)
    say(key ? "The server does not accept this API key." : "The server wants an API key.", {isProblem: true})
  } else if (error.retryAfterSeconds !== null) {
    say(`The server is busy: ${error.message}. Trying again in ${error.retryAfterSeconds} s.`, {isProblem: true})
  } else {
    say(error.status ? `The server refuses (${error.status}): ${error.message}` : error.message, {isProblem: true})
  }
}

function saySuggestion() {
  const answer = answers[shown]
  const others = answers.length > 1 ? ` ${shown + 1} of ${answers.length}` : ""
  say(`Suggestion${others}, ended by ${answer.endedBy}.`, {spoken: ghostText(view.state)})
}

// What is asked.

const key = () => sessionStorage.getItem(KEY)

/** Where the next answer belongs: at the cursor, before what was typed along with the one that is shown. */
const place = () => ghostPlace(view.state) ?? {from: view.state.selection.main.head, typed: 0}

function around({from, typed}) {
  const doc = view.state.doc
  return {prefix: doc.sliceString(0, from), suffix: doc.sliceString(from + typed)}
}

const settings = () => ({
  path: path.value.trim(),
  language: language.value,
  ending: ending.value,
})

function body() {
  const {prefix, suffix} = around(place())
  const n_predict = limit.valueAsNumber
  const n_probs = probabilities.checked ? NUM_PROBABILITIES : 0
  return {input_prefix: prefix, input_suffix: suffix, n_predict, n_probs, session_id: SESSION, ...settings()}
}

/** Ask at the cursor, and show the answer as it grows. */
async function suggest(signal) {
  if (view.composing) return asker.later(suggest)
  if (!limit.checkValidity()) return say(`Tokens at most: ${limit.validationMessage}`, {isProblem: true})
  forget()
  const request = body()
  const answer = new Answer(performance.now(), request.input_prefix)
  let isSlow = false
  const slow = setTimeout(() => {
    isSlow = true
    say("The model is still reading the text.")
  }, SLOW_MS)
  try {
    for await (const event of infill(request, key(), signal)) {
      clearTimeout(slow)
      answer.add(event)
      answers = [answer]
      if (answer.text) showGhost(view, place(), answer)
    }
  } finally {
    clearTimeout(slow)
    if (isSlow && signal.aborted) say("Given up.")
  }
  showFacts(answer)
  showCurl()
  if (ghostText(view.state)) saySuggestion()
  else say(`Nothing to suggest here, ended by ${answer.endedBy}.`)
}

/** Ask for other answers at the same place, and show the one `step` further. */
async function suggestOthers(signal, step) {
  const began = performance.now()
  const request = body()
  const {from, typed} = place()
  const soFar = view.state.sliceDoc(from, from + typed)
  for (const event of await infillAll({...request, n_cmpl: NUM_ALTERNATIVES}, key(), signal)) {
    const answer = new Answer(began, request.input_prefix)
    answer.add(event)
    const isNew = answers.every(({text}) => text !== answer.text)
    if (isNew && answer.text.startsWith(soFar) && answer.text.length > typed) answers.push(answer)
  }
  if (answers.length > 1) showOther(step)
  else say("No other suggestion.")
}

function showOther(step) {
  do shown = (shown + step + answers.length) % answers.length
  while (!showGhost(view, place(), answers[shown])) // One fits: that which the user typed along with.
  showFacts(answers[shown])
  saySuggestion()
}

function forget() {
  answers = []
  shown = 0
}

// What the user does.

const other = (step) => () => {
  if (!ghostText(view.state) || answers[shown].last === null) return true // Nothing, or still growing.
  if (answers.length === 1) asker.now((signal) => suggestOthers(signal, step))
  else showOther(step)
  return true
}

const commands = {
  next: other(1),
  previous: other(-1),
  suggest() {
    dismissGhost(view)
    asker.now(suggest)
    return true
  },
  dismiss() {
    asker.abort()
    hideCard()
    say(dismissGhost(view) ? "Dismissed. Tab leaves the editor." : "Tab leaves the editor.")
    return true
  },
}

/** Typing along keeps the suggestion and what still comes of it; anything else ends both. */
function onUpdate(update) {
  const hasGhost = ghostText(update.state) !== ""
  if ((update.docChanged || update.selectionSet) && !hasGhost) {
    asker.abort()
    forget()
    if (update.transactions.some((step) => step.isUserEvent("input") || step.isUserEvent("delete"))) {
      asker.later(suggest)
    }
  }
  for (const id of ["accept", "accept-word", "previous", "next", "dismiss"]) byId(id).disabled = !hasGhost
}

function showCurl() {
  const dialect = dialects[byId("dialect").selectedIndex]
  const request = {model: byId("model").textContent, limit: limit.valueAsNumber, settings: settings(), ...around(place())}
  byId("curl").value = curl(dialect, request, document.baseURI, needsKey)
}

async function copyCurl() {
  showCurl()
  const text = byId("curl")
  try {
    await navigator.clipboard.writeText(text.value)
    say("Copied.")
  } catch {
    text.select() // No clipboard without HTTPS, but on this machine.
    text.focus()
    say("The browser does not let this page copy. The command is selected: copy it with Ctrl C.")
  }
}

// The page.

const syntax = ({grammar: its, indent}) => [its, indentUnit.of(indent)]

const view = new EditorView({
  parent: byId("editor"),
  extensions: [
    ghostExtension(commands),
    lineNumbers(),
    history(),
    drawSelection(),
    indentOnInput(),
    bracketMatching(),
    highlightActiveLine(),
    keymap.of([...defaultKeymap, ...historyKeymap, indentWithTab]),
    grammar.of([]),
    theme,
    EditorState.tabSize.of(4),
    EditorView.contentAttributes.of({"aria-label": "Code. Escape, then Tab, leaves the editor."}),
    EditorView.updateListener.of(onUpdate),
  ],
})

let sample = languages[0]

function showSample(wanted) {
  sample = wanted
  path.value = sample.path
  const {before, after} = sample
  const changes = {from: 0, to: view.state.doc.length, insert: before + after}
  view.dispatch({changes, selection: {anchor: before.length}})
}

const isUntouched = () => view.state.doc.toString() === sample.before + sample.after && path.value === sample.path

function setLanguage(wanted) {
  language.value = wanted.id
  view.dispatch({effects: grammar.reconfigure(syntax(wanted))})
}

function chooseLanguage() {
  const wanted = languages[language.selectedIndex]
  if (isUntouched()) showSample(wanted)
  else if (path.value === sample.path) path.value = wanted.path
  setLanguage(wanted)
}

async function greet() {
  needsKey = await wantsKey()
  byId("model").textContent = await modelName(key())
  showCurl()
}

function useKey(event) {
  event.preventDefault()
  sessionStorage.setItem(KEY, byId("key").value)
  byId("key-form").hidden = true
  say("")
  greet().catch(sayProblem)
  view.focus()
}

function onClick(id, command) {
  byId(id).addEventListener("click", () => {
    command(view)
    view.focus()
  })
}

function start() {
  language.append(...languages.map(({id, name}) => new Option(name, id)))
  byId("dialect").append(...dialects.map(({name, route}) => new Option(`${name}: /${route}`)))
  showSample(sample)
  setLanguage(sample)
  startPanel()

  const buttons = {accept: acceptGhost, "accept-word": acceptWord, ...commands}
  for (const [id, command] of Object.entries(buttons)) onClick(id, command)
  language.addEventListener("change", chooseLanguage)
  path.addEventListener("input", () => {
    const wanted = languageOfPath(path.value)
    if (wanted) setLanguage(wanted)
  })
  for (const control of controls) {
    control.addEventListener("change", () => {
      dismissGhost(view)
      asker.later(suggest)
    })
  }
  byId("dialect").addEventListener("change", showCurl)
  byId("copy").addEventListener("click", copyCurl)
  byId("key-form").addEventListener("submit", useKey)
  say("Type, or press Alt \\ in the editor for a suggestion at the cursor.")
  greet().catch(sayProblem)
}

start()
