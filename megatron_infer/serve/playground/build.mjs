/** `npm run build`: src/ and what it imports as one file, playground.js, with the licences of what is in it. */

import {build} from "esbuild"
import {readdirSync, readFileSync, writeFileSync} from "node:fs"
import {dirname, join} from "node:path"
import {fileURLToPath} from "node:url"

const here = dirname(fileURLToPath(import.meta.url))
const target = process.argv[2] ?? here

const {metafile} = await build({
  absWorkingDir: here,
  entryPoints: ["src/main.js"],
  outfile: join(target, "playground.js"),
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  charset: "utf8",
  legalComments: "none",
  banner: {js: "/* Built from src/ by build.mjs. The licences of what it bundles are in LICENSES.txt. */"},
  metafile: true,
})

const [output] = Object.values(metafile.outputs)
const used = Object.entries(output.inputs).filter(([, {bytesInOutput}]) => bytesInOutput > 0)
const packages = new Set(used.flatMap(([path]) => /^node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(path)?.[1] ?? []))

function licence(name) {
  const folder = join(here, "node_modules", name)
  const {version, license} = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"))
  const file = readdirSync(folder).find((entry) => /^licen[sc]e/i.test(entry))
  return {title: `${name} ${version} (${license})`, text: readFileSync(join(folder, file), "utf8").trim()}
}

const titles = {} // By the text of the licence, which many share.
for (const {title, text} of [...packages].sort().map(licence)) titles[text] = [...(titles[text] ?? []), title]
const sections = Object.entries(titles).map(([text, names]) => `${names.join("\n")}\n\n${text}\n`)
const intro = "playground.js contains these packages, each under its licence:\n"
writeFileSync(join(target, "LICENSES.txt"), [intro, ...sections].join(`\n${"-".repeat(80)}\n\n`))
