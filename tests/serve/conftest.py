"""The server's packages are an extra (requirements-serve.txt): without them its tests are not collected."""

from __future__ import annotations

import importlib.util

if all(importlib.util.find_spec(name) for name in ("fastapi", "httpx", "uvicorn", "prometheus_client")):
    from tests.serve.running import held, running, small_llm, steps, tiny_llm  # noqa: F401
else:
    collect_ignore_glob = ["test_*.py"]
