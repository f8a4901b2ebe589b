/** One request at a time: a newer one, or the user going on, aborts the older. */

const DEBOUNCE_MS = 120

export class Asker {
  #timer
  #controller = new AbortController()
  #earliest = 0
  #onError

  constructor(onError) {
    this.#onError = onError
  }

  /** Forget what is planned and abort what runs. */
  abort() {
    clearTimeout(this.#timer)
    this.#controller.abort()
  }

  /** Call `ask(signal)` once the user rests, and not before a busy server wants it. */
  later(ask) {
    this.abort()
    this.#timer = setTimeout(() => this.now(ask), Math.max(DEBOUNCE_MS, this.#earliest - performance.now()))
  }

  async now(ask) {
    this.abort()
    const controller = (this.#controller = new AbortController())
    try {
      await ask(controller.signal)
    } catch (error) {
      if (controller.signal.aborted) return
      this.#onError(error)
      if (error.retryAfterSeconds == null) return
      this.#earliest = performance.now() + 1000 * error.retryAfterSeconds
      this.later(ask)
    }
  }
}
