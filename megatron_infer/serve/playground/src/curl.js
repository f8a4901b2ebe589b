/** The request as a curl command, in each dialect that the server speaks. */

/** Healing is asked for where the dialect's clients are not taken to be someone who types. */
const openai = ({model, prefix, suffix, limit, settings}) => ({
  model, prompt: prefix, suffix, max_tokens: limit, ...settings, token_healing: true,
})
const mistral = openai
const llamaCpp = ({prefix, suffix, limit, settings}) => ({
  input_prefix: prefix, input_suffix: suffix, n_predict: limit, ...settings,
})
const ollama = ({model, prefix, suffix, limit, settings}) => ({
  model, prompt: prefix, suffix, stream: false, options: {num_predict: limit}, ...settings, token_healing: true,
})
const tabby = ({prefix, suffix, settings: {path, ...others}}) => ({
  segments: {prefix, suffix, filepath: path}, ...others,
})

export const dialects = [
  {name: "OpenAI", route: "v1/completions", body: openai},
  {name: "Mistral", route: "v1/fim/completions", body: mistral},
  {name: "llama.cpp", route: "infill", body: llamaCpp},
  {name: "Ollama", route: "api/generate", body: ollama},
  {name: "Tabby", route: "v1/completions", body: tabby},
]

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`

/** A command for a POSIX shell. The key stays out of it: it is read from the environment. */
export function curl(dialect, request, base, needsKey) {
  const lines = [
    `curl ${quote(new URL(dialect.route, base).href)}`,
    `-H ${quote("Content-Type: application/json")}`,
    ...(needsKey ? ['-H "Authorization: Bearer $API_KEY"'] : []),
    `-d ${quote(JSON.stringify(dialect.body(request)))}`,
  ]
  return lines.join(" \\\n  ")
}
