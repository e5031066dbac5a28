"""Triton's interpreter, which makes its language anew at each call of a function inside a kernel.

A launch puts numpy's functions into triton.language and takes them out at its end; a function that
a kernel calls (a sum, say) puts them in once more, which is a fifth of what kernels take here.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once_a_launch() -> None:
    """Let functions inside a kernel find triton.language as the first of their kind left it."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: dict[tuple[bool, ...], Any] = {}

    def patch_once(function: Any) -> Any:
        names = function.__globals__.values()
        language = tuple(any(each is part for each in names) for part in (tl, tl.core))
        if language not in patched:
            patched[language] = patch(function)
        return patched[language]

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
