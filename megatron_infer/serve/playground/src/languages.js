/** The languages of the page: how the server names them, how files of them end, and a file to start with. */

import {StreamLanguage} from "@codemirror/language"
import {c, cpp, java} from "@codemirror/legacy-modes/mode/clike"
import {go} from "@codemirror/legacy-modes/mode/go"
import {javascript, typescript} from "@codemirror/legacy-modes/mode/javascript"
import {python} from "@codemirror/legacy-modes/mode/python"
import {rust} from "@codemirror/legacy-modes/mode/rust"

const PYTHON = `class Element:
    def __init__(self, name, parent=None):
        self.name = name
        self.parent = parent
        self.children = []

    def first_child(self):
        if self.children:
            return ▮

    def last_child(self):
        if self.children:
            return self.children[-1]
`

const JAVASCRIPT = `function average(values) {
  let total = 0
  for (const value of values) {
    ▮
  }
  return total / values.length
}
`

const TYPESCRIPT = `function average(values: number[]): number {
  let total = 0
  for (const value of values) {
    ▮
  }
  return total / values.length
}
`

const C = `double average(const double *values, int count) {
    double total = 0;
    for (int i = 0; i < count; i++) {
        ▮
    }
    return total / count;
}
`

const CPP = `#include <vector>

double average(const std::vector<double> &values) {
    double total = 0;
    for (double value : values) {
        ▮
    }
    return total / values.size();
}
`

const JAVA = `class Statistics {
    static double average(double[] values) {
        double total = 0;
        for (double value : values) {
            ▮
        }
        return total / values.length;
    }
}
`

const GO = `package statistics

func Average(values []float64) float64 {
	total := 0.0
	for _, value := range values {
		▮
	}
	return total / float64(len(values))
}
`

const RUST = `fn average(values: &[f64]) -> f64 {
    let mut total = 0.0;
    for value in values {
        ▮
    }
    total / values.len() as f64
}
`

const language = (id, name, grammar, indent, extensions, sample) => {
  const [before, after] = sample.split("▮")
  const path = `example${extensions[0]}`
  return {id, name, grammar: StreamLanguage.define(grammar), indent, extensions, path, before, after}
}

/** `id` is a key of the server's languages.json. */
export const languages = [
  language("python", "Python", python, "    ", [".py", ".pyi"], PYTHON),
  language("javascript", "JavaScript", javascript, "  ", [".js", ".mjs", ".cjs"], JAVASCRIPT),
  language("typescript", "TypeScript", typescript, "  ", [".ts", ".mts", ".cts"], TYPESCRIPT),
  language("c", "C", c, "    ", [".c"], C),
  language("c++", "C++", cpp, "    ", [".cpp", ".cc", ".cxx", ".hpp", ".h"], CPP),
  language("java", "Java", java, "    ", [".java"], JAVA),
  language("go", "Go", go, "\t", [".go"], GO),
  language("rust", "Rust", rust, "    ", [".rs"], RUST),
]

/** The language of the files whose names end like `path`, if it is one of ours. */
export function languageOfPath(path) {
  return languages.find(({extensions}) => extensions.some((extension) => path.endsWith(extension)))
}
