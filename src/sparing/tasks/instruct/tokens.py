"""Text into tokens, with a note of which of them are to be learnt: those of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from sparing.core.errors import RequestError

BYTES = 256
END = 256
"""The token after a completion, among bytes."""
ROLES = ("system", "user", "assistant")

Encoded = tuple[list[int], list[bool]]
"""Tokens, and whether each is a part of a completion."""


@final
class ByteTokens:
    """A token for each byte and one for the end; chat as lines of ``role: content``."""

    size = BYTES + 1

    def pair(self, prompt: str, completion: str) -> Encoded:
        """A prompt, a line's end, the completion, the end."""
        asked, told = list(f"{prompt}\n".encode()), [*completion.encode(), END]
        return asked + told, [False] * len(asked) + [True] * len(told)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Encoded:
        """Each message on a line; what the assistant says, and its end, is to be learnt."""
        ids: list[int] = []
        learnt: list[bool] = []
        for message in messages:
            said = message["role"] == "assistant"
            head = list(f"{message['role']}: ".encode())
            body = [*message["content"].encode(), END if said else ord("\n")]
            ids += head + body
            learnt += [False] * len(head) + [said] * len(body)
        return ids, learnt

    def text(self, ids: Sequence[int]) -> str:
        """Bytes that are no text are shown as such."""
        return bytes(i for i in ids if i < BYTES).decode("utf-8", "replace")


@final
class HubTokens:
    """A Hugging Face tokenizer from a folder, with its own chat template."""

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.inner: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise RequestError(f"there is no tokenizer in {path}: {error}") from error
        self.path, self.size = path, len(self.inner)
        if self.inner.eos_token_id is None:
            raise RequestError(f"the tokenizer in {path} has no end token (eos_token); give it one")

    def pair(self, prompt: str, completion: str) -> Encoded:
        """The template around them if there is one, else as bytes have it."""
        if self.inner.chat_template:
            return self.chat(
                [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": completion},
                ]
            )
        asked = self._ids(f"{prompt}\n")
        told = [*self._ids(completion), int(self.inner.eos_token_id)]
        return asked + told, [False] * len(asked) + [True] * len(told)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Encoded:
        """Raises RequestError for a tokenizer without a chat template, or one that rewrites what
        came before."""
        if not self.inner.chat_template:
            raise RequestError(
                f"the tokenizer in {self.path} has no chat template, and the data is chat; set its "
                "chat_template, take another tokenizer, or give prompt and completion"
            )
        ids: list[int] = []
        learnt: list[bool] = []
        done = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:place], ask=True)
            after = self._render(messages[: place + 1], ask=False)
            if not before.startswith(done) or not after.startswith(before):
                raise RequestError(
                    f"the chat template in {self.path} changes earlier messages when later ones "
                    "come: what is to be learnt cannot be told apart; use single answers"
                )
            for part, said in ((before[len(done) :], False), (after[len(before) :], True)):
                piece = self._ids(part)
                ids, learnt, done = ids + piece, learnt + [said] * len(piece), after
        return ids, learnt

    def _render(self, messages: Sequence[Mapping[str, str]], *, ask: bool) -> str:
        text: str = self.inner.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )
        return text

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.inner(text, add_special_tokens=False)["input_ids"]
        return found

    def text(self, ids: Sequence[int]) -> str:
        """As the tokenizer reads them back."""
        found: str = self.inner.decode(list(ids), skip_special_tokens=True)
        return found


Tokens = ByteTokens | HubTokens


def encoded(row: Any, tokens: Tokens, where: str, most: int) -> Encoded:
    """An example of ``prompt`` and ``completion``, or ``messages``, cut to ``most`` tokens.

    A completion keeps its beginning, in up to half of them or what the prompt leaves; a prompt
    keeps its end. Raises RequestError, naming ``where``, for a row of another form.
    """
    if isinstance(row, Mapping) and "messages" in row:
        ids, learnt = tokens.chat(_messages(row["messages"], where))
    elif isinstance(row, Mapping) and {"prompt", "completion"} <= set(row):
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
            raise RequestError(f"{where}: prompt and completion must be text, and one to learn")
        ids, learnt = tokens.pair(prompt, completion)
    else:
        keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise RequestError(
            f"{where} has neither prompt and completion nor messages, but {keys}; each line is an "
            "object with one or the other"
        )
    if len(ids) <= most:
        return ids, learnt
    first = learnt.index(True)
    told = min(len(ids) - first, max(most // 2, most - first))
    start = max(0, first + told - most)
    return ids[start : first + told], learnt[start : first + told]


def _messages(given: Any, where: str) -> list[Mapping[str, str]]:
    good = isinstance(given, list) and all(
        isinstance(m, Mapping) and m.get("role") in ROLES and isinstance(m.get("content"), str)
        for m in given
    )
    if not good or not any(m["role"] == "assistant" and m["content"] for m in given):
        raise RequestError(
            f"{where}: messages must be a list of {{role, content}} with roles {', '.join(ROLES)}, "
            "and one of the assistant's with something to learn"
        )
    found: list[Mapping[str, str]] = given
    return found
