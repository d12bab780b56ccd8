"""Requests to a server with JSON, with retries, on the standard library alone."""

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that a later request may not get."""


class HTTPStatusError(ValueError):
    """The server answered with an error, and a retry did not change it.

    Args:
        message: The message.
        status: The HTTP status.
        body: What the server said.
    """

    def __init__(self, message: str, status: int, body: str) -> None:
        super().__init__(message)
        self.status, self.body = status, body


class Client:
    """Sends requests to a server.

    Args:
        url: The base URL, such as ``http://localhost:8000/v1``.
        api_key: The key for the header ``Authorization``. None sends no key.
        timeout: The seconds until a request has failed.
        retries: How many times a failed request is sent again.
        backoff: The seconds before the first retry. Each further one waits twice as long, at most 60 seconds.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float, retries: int, backoff: float) -> None:
        self.url, self.timeout, self.retries, self.backoff = url.rstrip("/"), timeout, retries, backoff
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
        # A proxy cannot reach a server on this machine.
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send JSON and return the JSON of the answer.

        Args:
            path: The path behind the base URL, or a whole URL.
            body: The request.

        Raises:
            HTTPStatusError: If the server refuses the request.
            ValueError: If no request succeeded. The message has the last failure.
        """
        return self.send(path, json.dumps(body).encode())

    def send(
        self, path: str, body: bytes | None = None, *, attempts: int | None = None, any_answer: bool = False
    ) -> dict[str, Any]:
        """Send a request with a body (POST) or without one (GET). See `post`.

        Args:
            path: The path behind the base URL, or a whole URL.
            body: The body.
            attempts: The number of attempts. Default is `retries` plus 1.
            any_answer: Whether the answer may be anything. If not, it must be a JSON object.
        """
        url = path if "://" in path else f"{self.url}{path}"
        last, status, said = "", 0, ""
        attempts = self.retries + 1 if attempts is None else attempts
        for attempt in range(attempts):
            wait = min(60.0, self.backoff * 2**attempt) * random.uniform(0.75, 1.25)
            try:
                with self._opener.open(urllib.request.Request(url, body, self.headers), timeout=self.timeout) as answer:
                    text = answer.read().decode("utf-8", errors="replace")
                content = {} if any_answer else json.loads(text)
                if isinstance(content, dict):
                    return content
                last = f"the answer is no JSON object, but {text[:200]!r}"
            except urllib.error.HTTPError as error:
                said = error.read().decode("utf-8", errors="replace").strip()
                last, status = f"HTTP {error.code}: {said[:500]}", error.code
                if error.code not in RETRIED:
                    raise HTTPStatusError(f"{url} answered with {last}", error.code, said) from error
                after = error.headers.get("Retry-After", "")
                wait = max(wait, float(after)) if after.isdigit() else wait
            except TimeoutError:
                last = f"no answer within {self.timeout:g} seconds. Raise `timeout`, or lower `workers`"
            except json.JSONDecodeError as error:
                last = f"the answer is not valid JSON ({error})"
            except (OSError, urllib.error.URLError) as error:
                reason = getattr(error, "reason", error)
                last = f"{reason}. Check that the server runs and that `url` is right"
                if isinstance(reason, TimeoutError):
                    last = f"no answer within {self.timeout:g} seconds. Raise `timeout`, or lower `workers`"
            if attempt < attempts - 1:
                time.sleep(wait)
        message = f"{url} failed {attempts} times. The last time: {last}."
        raise HTTPStatusError(message, status, said) if last.startswith("HTTP ") else ValueError(message)
