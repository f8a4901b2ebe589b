/** How the editor looks. Colours are the page's custom properties, so that dark and light are a matter of CSS alone. */

import {HighlightStyle, syntaxHighlighting} from "@codemirror/language"
import {EditorView} from "@codemirror/view"
import {tags} from "@lezer/highlight"

const highlight = HighlightStyle.define([
  {tag: [tags.keyword, tags.operatorKeyword, tags.modifier], color: "var(--keyword)"},
  {tag: [tags.string, tags.special(tags.string), tags.character], color: "var(--string)"},
  {tag: [tags.number, tags.bool, tags.null, tags.atom], color: "var(--number)"},
  {tag: [tags.comment, tags.meta], color: "var(--comment)"},
  {tag: [tags.typeName, tags.className, tags.namespace], color: "var(--type)"},
  {tag: [tags.function(tags.variableName), tags.function(tags.propertyName)], color: "var(--function)"},
])

const look = EditorView.theme({
  "&": {color: "var(--text)", backgroundColor: "var(--field)", fontSize: "0.9375rem"},
  ".cm-scroller": {fontFamily: "var(--mono)", lineHeight: "1.5"},
  ".cm-content": {caretColor: "var(--text)", minHeight: "18em"},
  "&.cm-focused": {outline: "none"},
  "&.cm-focused .cm-cursor, .cm-cursor": {borderLeftColor: "var(--text)"},
  ".cm-gutters": {color: "var(--muted)", backgroundColor: "var(--field)", borderRight: "1px solid var(--line)"},
  ".cm-activeLine, .cm-activeLineGutter": {backgroundColor: "var(--active)"},
  "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground": {
    background: "var(--selection)",
  },
  "&.cm-focused .cm-matchingBracket": {backgroundColor: "var(--selection)"},
})

export const theme = [look, syntaxHighlighting(highlight)]
