/** What is known of the latest answer: times, counts, why it ended, its tokens. Knows no editor and no server. */

const byId = (id) => document.getElementById(id)
const card = byId("token-card")
const strip = byId("tokens")

const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`
const tokenCount = (number) => `${number} token${number === 1 ? "" : "s"}`
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`

/** A token's text with its white space to be seen. */
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(end)"

let tokens = []
let anchor = null // The token that the card is about. While it has the focus, the card stays.

/** `answer` must have come to its end. */
export function showFacts(answer) {
  const {last, firstTextMs, wholeMs} = answer
  const {first_token_ms: first, total_ms: total} = last.megatron_infer
  const facts = {
    "first-token": `${ms(first)} in the server` + (firstTextMs === null ? "" : `, ${ms(firstTextMs)} here`),
    "whole-answer": `${ms(total)} in the server, ${ms(wholeMs)} here`,
    "prompt-tokens": promptTokens(last),
    "new-tokens": newTokens(last),
    "ended-by": answer.endedBy,
  }
  for (const [id, text] of Object.entries(facts)) byId(id).textContent = text
  showTokens(answer)
}

function promptTokens({tokens_evaluated: number, timings, megatron_infer: {dropped_tokens: dropped}}) {
  return `${tokenCount(number)}, ${timings.cache_n} of them cached` + (dropped ? `; ${dropped} more did not fit` : "")
}

function newTokens({tokens_predicted: number, timings: {draft_n: drafted, draft_n_accepted: accepted}}) {
  return tokenCount(number) + (drafted ? `; ${accepted} of ${drafted} drafted ones accepted` : ", none drafted")
}

function showTokens(answer) {
  hideCard()
  tokens = answer.tokens
  const {numKept} = answer
  strip.replaceChildren(
    ...tokens.map((token, index) => {
      const button = document.createElement("button")
      button.type = "button"
      button.tabIndex = index === 0 ? 0 : -1
      button.dataset.token = index
      button.className = index < numKept ? "" : "cut"
      button.textContent = visible(token.name)
      const cut = index < numKept ? "" : ", not part of the suggestion"
      button.setAttribute("aria-label", `${visible(token.name)}, ${percent(token.probability)}${cut}`)
      button.setAttribute("aria-describedby", card.id)
      return button
    }),
  )
}

/** Show what else token `index` could have been, beside `element`. */
function showCard(element, index) {
  const token = tokens[index]
  if (!token) return
  const rows = [token, ...token.likely.filter((other) => other.name !== token.name)]
  rows.sort((a, b) => b.probability - a.probability)
  card.replaceChildren(
    ...rows.map((row) => {
      const line = document.createElement("p")
      const text = line.appendChild(document.createElement("code"))
      text.textContent = visible(row.name)
      line.append(` ${percent(row.probability)}`)
      line.className = row === token ? "chosen" : ""
      return line
    }),
  )
  card.hidden = false
  anchor = element
  placeCard()
}

function placeCard() {
  const place = anchor.getBoundingClientRect()
  const left = Math.min(place.left, window.innerWidth - card.offsetWidth - 8)
  const below = place.bottom + card.offsetHeight + 8 <= window.innerHeight
  card.style.left = `${Math.max(8, left)}px`
  card.style.top = `${below ? place.bottom + 2 : place.top - card.offsetHeight - 2}px`
}

export function hideCard() {
  card.hidden = true
}

const isHeld = () => anchor?.matches(":focus")

function onPoint(event) {
  const element = event.target.closest?.("[data-token]")
  if (element) showCard(element, Number(element.dataset.token))
  else if (!card.contains(event.target) && !isHeld()) hideCard()
}

function onScroll() {
  if (isHeld()) placeCard()
  else hideCard()
}

const STEPS = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity}

function onKey(event) {
  if (!(event.key in STEPS)) return
  event.preventDefault()
  const buttons = [...strip.children]
  const index = buttons.indexOf(document.activeElement) + STEPS[event.key]
  const next = buttons[Math.max(0, Math.min(index, buttons.length - 1))]
  for (const button of buttons) button.tabIndex = button === next ? 0 : -1
  next.focus()
}

export function startPanel() {
  document.addEventListener("pointerover", onPoint)
  document.addEventListener("scroll", onScroll, {capture: true, passive: true})
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideCard())
  strip.addEventListener("focusin", onPoint)
  strip.addEventListener("focusout", hideCard)
  strip.addEventListener("keydown", onKey)
}
