/** The request as a curl command, in each dialect that the server speaks. */

const openai = ({model, prefix, suffix, limit, path, language, ending}) => ({
  model, prompt: prefix, suffix, max_tokens: limit, path, language, ending,
})
const mistral = openai
const llamaCpp = ({prefix, suffix, limit, path, language, ending}) => ({
  input_prefix: prefix, input_suffix: suffix, n_predict: limit, path, language, ending,
})
const ollama = ({model, prefix, suffix, limit, path, language, ending}) => ({
  model, prompt: prefix, suffix, stream: false, options: {num_predict: limit}, path, language, ending,
})
const tabby = ({prefix, suffix, path, language, ending}) => ({
  language, segments: {prefix, suffix, filepath: path || undefined}, ending,
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
