"""One small source file per language with every kind of hole, and the holes that a reader finds in it.

SOURCES: language -> text. HOLES: language -> scenario -> the references, in the order of the text; "single_line" and
"empty" have one example instead, as (reference, what comes right before it).
"""

from __future__ import annotations

PYTHON = '''\
import os


# Adds up what is positive.
@cached
def total(values, limit=3):
    result = 0
    # in place
    for value in values:
        if value > 0:
            result += value
        elif value < -9: break
    while result > limit:
        result -= 1
    return result


class Reader:
    def read(self, path):
        """Read a file: größer als 日本."""
        try:
            return open(path).read()
        except OSError:
            return ""

    # ----
    async def close(self) -> None:  # soon
        match self.state:
            case 1:
                self.file.close()
'''

JAVA = """\
class Sums {
    /** Adds up what is positive: größer. */
    @Override
    public int total(int[] values) throws IOException {
        int result = 0;
        for (int value : values) {
            if (value > 0) {
                result += value;
            } else if (value < -9) {
                break;
            }
        }
        while (result > limit) {
            result--;
        }
        return result;
    }

    Sums(int kind) {
        switch (kind) {
            case 1: this.kind = kind;
        }
        try {
            open();
        } finally {
            close();
        }
    }

    abstract void close();
}
"""

CPP = """\
namespace sums {
// Adds up what is positive: größer.
template <class T>
[[nodiscard]] static T total(const std::vector<T>& values) noexcept {
    T result = 0;
    for (auto value : values) {
        if (value > 0) {
            result += value;
        } else if (value < -9) {
            break;
        }
    }
    while (result > limit) {
        result--;
    }
    return result;
}

Reader::Reader(int kind) : kind_(kind) {
    switch (kind) {
        case 1: open();
    }
    try {
        open();
    } catch (...) {
        close();
    }
}
}  // namespace sums
"""

JAVASCRIPT = """\
// Adds up what is positive: größer.
export async function total(values, limit = 3) {
  let result = 0;
  for (const value of values) {
    if (value > 0) {
      result += value;
    } else if (value < -9) {
      break;
    }
  }
  while (result > limit) {
    result--;
  }
  return result;
}

class Reader {
  read(path) {
    try {
      return open(path);
    } catch (error) {
      return "";
    }
  }

  get kind() {
    switch (this.state) {
      case 1: return "open";
    }
  }
}
"""

TYPESCRIPT = """\
// Adds up what is positive: größer.
export async function total(values: number[], limit = 3): Promise<number> {
  let result = 0;
  for (const value of values) {
    if (value > 0) {
      result += value;
    } else if (value < -9) {
      break;
    }
  }
  while (result > limit) {
    result--;
  }
  return result;
}

class Reader {
  @logged()
  private read<T>(path: string): T {
    try {
      return open(path);
    } catch (error) {
      return "";
    }
  }

  get kind(): string {
    switch (this.state) {
      case 1: return "open";
    }
  }
}
"""

CSHARP = """\
class Sums {
    /// <summary>Adds up what is positive: größer.</summary>
    [Pure]
    public static int Total(int[] values) {
        var result = 0;
        foreach (var value in values) {
            if (value > 0) {
                result += value;
            } else if (value < -9) {
                break;
            }
        }
        while (result > limit) {
            result--;
        }
        return result;
    }

    Sums(int kind) : base(kind) {
        switch (kind) {
            case 1: Open(); break;
        }
        try {
            Open();
        } finally {
            Close();
        }
    }

    int Kind() => 1;
}
"""

GO = """\
package sums

// Total adds up what is positive: größer.
func Total(values []int) (int, error) {
	result := 0
	for _, value := range values {
		if value > 0 {
			result += value
		} else if value < -9 {
			break
		}
	}
	for result > limit {
		result--
	}
	return result, nil
}

func (r *Reader) Close() {
	switch r.kind {
	case 1:
		r.file.Close()
	}
	select {
	case <-r.done:
		r.log()
	}
}
"""

RUST = """\
/// Adds up what is positive: größer.
#[inline]
pub fn total<T>(values: &[T]) -> i32 where T: Copy {
    let mut result = 0;
    for value in values {
        if *value > 0 {
            result += value;
        } else if *value < -9 {
            break;
        }
    }
    while result > limit {
        result -= 1;
    }
    result
}

impl Reader {
    fn close(&mut self) {
        let kind = if self.open { 1 } else { 2 };
        match kind {
            1 => self.file.close(),
            _ => {}
        }
    }
}
"""

SOURCES = {
    "python": PYTHON,
    "java": JAVA,
    "cpp": CPP,
    "javascript": JAVASCRIPT,
    "typescript": TYPESCRIPT,
    "csharp": CSHARP,
    "go": GO,
    "rust": RUST,
}
EXTENSIONS = {
    "python": ".py",
    "java": ".java",
    "cpp": ".cpp",
    "javascript": ".js",
    "typescript": ".ts",
    "csharp": ".cs",
    "go": ".go",
    "rust": ".rs",
}


def _span(text: str, first: str, last: str) -> str:
    """The text from the first time `first` comes up to the end of the next `last`."""
    start = text.index(first)
    return text[start : text.index(last, start) + len(last)]


def _holes(
    text: str, *, signatures: list[str], documented: list[str], body: tuple[str, str], statements: dict[str, list[str]],
    bodies: list[str], line: tuple[str, str],
) -> dict[str, list[str]]:  # fmt: skip
    """The table of one text. `body` is first line and last of the method with four statements."""
    whole = _span(text, *body)
    middle = _span(whole, statements["for_statement"][0], statements["while_statement"][0])
    return {
        "method_signature": signatures,
        "method_with_comment": documented,
        "method_body": [whole, *bodies],
        "method_body_top": [body[0]],
        "method_body_mid": [middle],
        "method_body_bottom": [body[1]],
        "single_line": list(line),
        **statements,
    }


HOLES = {
    "python": _holes(
        PYTHON,
        signatures=["def total(values, limit=3):", "def read(self, path):", "async def close(self) -> None:"],
        documented=[_span(PYTHON, "@cached", "return result"), _span(PYTHON, "try:", 'return ""')],
        body=("result = 0", "return result"),
        bodies=[_span(PYTHON, "match self", "self.file.close()")],
        line=("result -= 1", "limit:\n        "),
        statements={
            "if_statement": [_span(PYTHON, "if value > 0", "break")],
            "for_statement": [_span(PYTHON, "for value", "break")],
            "while_statement": [_span(PYTHON, "while", "-= 1")],
            "try_statement": [_span(PYTHON, "try:", 'return ""')],
            "switch_statement": [_span(PYTHON, "match self", "self.file.close()")],
        },
    ),
    "java": _holes(
        JAVA,
        signatures=["public int total(int[] values) throws IOException", "Sums(int kind)"],
        documented=[_span(JAVA, "@Override", "return result;\n    }")],
        body=("int result = 0;", "return result;"),
        bodies=[_span(JAVA, "switch", "close();\n        }")],
        line=("result--;", "limit) {\n            "),
        statements={
            "if_statement": [_span(JAVA, "if (value > 0)", "break;\n            }")],
            "for_statement": [_span(JAVA, "for (", "break;\n            }\n        }")],
            "while_statement": [_span(JAVA, "while", "}")],
            "try_statement": [_span(JAVA, "try", "close();\n        }")],
            "switch_statement": [_span(JAVA, "switch", "}")],
        },
    ),
    "cpp": _holes(
        CPP,
        signatures=["static T total(const std::vector<T>& values) noexcept", "Reader::Reader(int kind)"],
        documented=[_span(CPP, "template", "return result;\n}")],
        body=("T result = 0;", "return result;"),
        bodies=[_span(CPP, "switch", "close();\n    }")],
        line=("result--;", "limit) {\n        "),
        statements={
            "if_statement": [_span(CPP, "if (value > 0)", "break;\n        }")],
            "for_statement": [_span(CPP, "for (", "break;\n        }\n    }")],
            "while_statement": [_span(CPP, "while", "}")],
            "try_statement": [_span(CPP, "try", "close();\n    }")],
            "switch_statement": [_span(CPP, "switch", "}")],
        },
    ),
    "javascript": _holes(
        JAVASCRIPT,
        signatures=["async function total(values, limit = 3)", "read(path)", "get kind()"],
        documented=[_span(JAVASCRIPT, "export", "return result;\n}")],
        body=("let result = 0;", "return result;"),
        bodies=[_span(JAVASCRIPT, "try", 'return "";\n    }'), _span(JAVASCRIPT, "switch", "}")],
        line=("result--;", "limit) {\n    "),
        statements={
            "if_statement": [_span(JAVASCRIPT, "if (value > 0)", "break;\n    }")],
            "for_statement": [_span(JAVASCRIPT, "for (", "break;\n    }\n  }")],
            "while_statement": [_span(JAVASCRIPT, "while", "}")],
            "try_statement": [_span(JAVASCRIPT, "try", 'return "";\n    }')],
            "switch_statement": [_span(JAVASCRIPT, "switch", "}")],
        },
    ),
    "typescript": _holes(
        TYPESCRIPT,
        signatures=[
            "async function total(values: number[], limit = 3): Promise<number>",
            "private read<T>(path: string): T",
            "get kind(): string",
        ],
        documented=[_span(TYPESCRIPT, "export", "return result;\n}")],
        body=("let result = 0;", "return result;"),
        bodies=[_span(TYPESCRIPT, "try", 'return "";\n    }'), _span(TYPESCRIPT, "switch", "}")],
        line=("result--;", "limit) {\n    "),
        statements={
            "if_statement": [_span(TYPESCRIPT, "if (value > 0)", "break;\n    }")],
            "for_statement": [_span(TYPESCRIPT, "for (", "break;\n    }\n  }")],
            "while_statement": [_span(TYPESCRIPT, "while", "}")],
            "try_statement": [_span(TYPESCRIPT, "try", 'return "";\n    }')],
            "switch_statement": [_span(TYPESCRIPT, "switch", "}")],
        },
    ),
    "csharp": _holes(
        CSHARP,
        signatures=["public static int Total(int[] values)", "Sums(int kind)"],
        documented=[_span(CSHARP, "[Pure]", "return result;\n    }")],
        body=("var result = 0;", "return result;"),
        bodies=[_span(CSHARP, "switch", "Close();\n        }")],
        line=("result--;", "limit) {\n            "),
        statements={
            "if_statement": [_span(CSHARP, "if (value > 0)", "break;\n            }")],
            "for_statement": [_span(CSHARP, "foreach (", "break;\n            }\n        }")],
            "while_statement": [_span(CSHARP, "while", "}")],
            "try_statement": [_span(CSHARP, "try", "Close();\n        }")],
            "switch_statement": [_span(CSHARP, "switch", "}")],
        },
    ),
    "go": _holes(
        GO,
        signatures=["func Total(values []int) (int, error)", "func (r *Reader) Close()"],
        documented=[_span(GO, "func Total", "return result, nil\n}")],
        body=("result := 0", "return result, nil"),
        bodies=[_span(GO, "switch", "r.log()\n\t}")],
        line=("result--", "limit {\n\t\t"),
        statements={
            "if_statement": [_span(GO, "if value > 0", "break\n\t\t}")],
            "for_statement": [_span(GO, "for _,", "break\n\t\t}\n\t}")],
            "while_statement": [_span(GO, "for result", "}")],
            "switch_statement": [_span(GO, "switch", "}"), _span(GO, "select", "}")],
        },
    ),
    "rust": _holes(
        RUST,
        signatures=["pub fn total<T>(values: &[T]) -> i32 where T: Copy", "fn close(&mut self)"],
        documented=[_span(RUST, "#[inline]", "result\n}")],
        body=("let mut result = 0;", "    }\n    result"),
        bodies=[_span(RUST, "let kind", "_ => {}\n        }")],
        line=("result -= 1;", "limit {\n        "),
        statements={
            "if_statement": [_span(RUST, "if *value > 0", "break;\n        }")],
            "for_statement": [_span(RUST, "for value", "break;\n        }\n    }")],
            "while_statement": [_span(RUST, "while", "}")],
            "switch_statement": [_span(RUST, "match", "_ => {}\n        }")],
        },
    ),
}
HOLES["rust"]["method_body_bottom"] = ["result"]
