/** One answer of the server, growing or whole: its text, its tokens, what the server reports about it. */

const RULES = {
  line: "the line is over",
  "rest-of-line": "the text reached what follows the cursor on its line",
  closer: "a bracket or string closed that the code below closes already",
  "line-below": "the text began to repeat the code below",
  dedent: "the text left the block",
  blank: "two blank lines, or one at the top level",
  repeat: "the same line for the third time",
  unfinished: "a limit cut the text, which goes back to a place where the code below fits",
}
const STOPS = {eos: "the model's end token", limit: "the limit on new tokens"}

export class Answer {
  text = ""
  tokens = []
  firstTextMs = null
  wholeMs = null
  last = null
  numHealed = 0 // Characters of the prefix that the first tokens wrote anew (token healing).

  /** began: when it was asked for, as of performance.now(). prefix: the code before the cursor. */
  constructor(began, prefix) {
    this.began = began
    this.prefix = prefix
  }

  /** event: as the server streams them, or a whole answer. */
  add(event) {
    const now = performance.now() - this.began
    if (event.content) this.firstTextMs ??= now
    this.text += event.content
    if (!event.stop) return
    this.wholeMs = now
    this.last = event
    this.tokens = tokens(event.completion_probabilities ?? [])
    this.numHealed = numHealed(this)
  }

  /** The text after its first `typed` characters, cut where the tokens meet: [{text, token}], token as an index. */
  pieces(typed) {
    const whole = this.prefix.slice(this.prefix.length - this.numHealed) + this.text
    const shown = this.numHealed + typed
    const pieces = []
    let end = 0
    for (const [index, token] of this.tokens.entries()) {
      const start = end
      const text = token.text.slice(0, whole.length - start)
      if (!whole.startsWith(text, start)) break
      end = start + text.length
      if (end > Math.max(start, shown)) pieces.push({text: whole.slice(Math.max(start, shown), end), token: index})
    }
    const rest = whole.slice(Math.max(end, shown))
    return rest ? [...pieces, {text: rest, token: null}] : pieces
  }

  /** How many tokens the text consists of; a rule or a stop string cut off those after. */
  get numKept() {
    return (this.pieces(0).at(-1)?.token ?? -1) + 1
  }

  get endedBy() {
    const {stop_type: stop, stopping_word: word, megatron_infer: {trimmed_by: [rule]}} = this.last
    if (rule) return `${rule}: ${RULES[rule] ?? "a rule about endings"}`
    return stop === "word" ? `the stop string ${word}` : STOPS[stop]
  }
}

function numHealed({text, tokens, prefix}) {
  const written = tokens.map((token) => token.text).join("")
  for (let number = 0; number < written.length; number++) {
    if (written.startsWith(text, number) && prefix.endsWith(written.slice(0, number))) return number
  }
  return 0
}

/** Each with the characters that it completes: a token may be a part of one. */
function tokens(rows) {
  const decoder = new TextDecoder()
  return rows.map(({token: name, bytes, logprob, top_logprobs: top}) => ({
    name,
    text: decoder.decode(new Uint8Array(bytes), {stream: true}),
    probability: Math.exp(logprob),
    likely: top.map((other) => ({name: other.token, probability: Math.exp(other.logprob)})),
  }))
}
