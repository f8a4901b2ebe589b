/** The server's `POST /infill`: one answer as it grows, or several whole ones. Knows no editor. */

/** Why there is no answer, in words for the user. status: 0 where the server was not reached. */
export class ServerError extends Error {
  constructor(message, status, retryAfterSeconds = null) {
    super(message)
    this.status = status
    this.retryAfterSeconds = retryAfterSeconds
  }
}

const GONE = "The server does not answer. Is it still running?"

async function request(path, options) {
  let response
  try {
    response = await fetch(path, {...options, cache: "no-store"})
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(GONE, 0)
  }
  if (response.ok) return response
  const body = await response.text()
  const seconds = Number.parseFloat(response.headers.get("Retry-After"))
  throw new ServerError(reason(body), response.status, Number.isFinite(seconds) ? seconds : null)
}

/** The words of an error's body, which each dialect wraps in its own way. */
function reason(body) {
  try {
    const {error, message} = JSON.parse(body)
    return String(error?.message ?? message ?? error ?? body)
  } catch {
    return body || "no reason given"
  }
}

const headers = (key) => (key ? {Authorization: `Bearer ${key}`} : {})

const post = (body, key, signal) =>
  request("infill", {
    method: "POST",
    headers: {"Content-Type": "application/json", ...headers(key)},
    body: JSON.stringify(body),
    signal,
  })

/** The name under which the server's model is served. */
export async function modelName(key) {
  const response = await request("v1/models", {headers: headers(key)})
  return (await response.json()).data[0].id
}

/** Whether the server wants a key of those who have shown none. (A browser may have, before it got this page.) */
export async function wantsKey() {
  try {
    await request("v1/models", {credentials: "omit"})
    return false
  } catch (error) {
    if (error.status === 401) return true
    throw error
  }
}

/** Whole answers, one for each of `body.n_cmpl`. */
export async function infillAll(body, key, signal) {
  const response = await post({...body, stream: false}, key, signal)
  return [await response.json()].flat()
}

/** The events of one answer, the last of which has `stop: true`. */
export async function* infill(body, key, signal) {
  const response = await post({...body, stream: true}, key, signal)
  let event
  try {
    for await (const data of serverSentEvents(response.body)) {
      event = JSON.parse(data)
      if (event.error) throw new ServerError(reason(data), event.error.code ?? 500)
      yield event
    }
  } catch (error) {
    throw error instanceof TypeError ? new ServerError(GONE, 0) : error // What a broken connection looks like.
  }
  if (!event?.stop) throw new ServerError("The connection ended before the answer did.", 0)
}

/** The data of each event of a stream; comments, which only keep it alive, are skipped. */
async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ""
  for (;;) {
    const {value, done} = await reader.read()
    if (done) return
    const events = (rest + value).split("\n\n")
    rest = events.pop()
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"))
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n")
    }
  }
}
