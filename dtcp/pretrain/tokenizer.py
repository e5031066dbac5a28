"""Text to token ids: one token per byte, or the tokenizer of a Hugging Face folder."""

from dataclasses import dataclass

from dtcp.torchtitan import compat as compat

from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

BYTES = 256
BOS, EOS = BYTES, BYTES + 1


class Tokenizer(BaseTokenizer):
    """Bytes by default, so that a bare machine can train; a folder's tokenizer when named."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        folder: str = ""
        """Folder that holds tokenizer.json; empty for one token per byte."""

    def __init__(self, config: Config, *, tokenizer_path: str):
        super().__init__()
        self.inner = (
            HuggingFaceTokenizer(tokenizer_path=config.folder) if config.folder else ByteTokenizer()
        )
        self.bos_id, self.eos_id = self.inner.bos_id, self.inner.eos_id

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return self.inner.encode(text, add_bos=add_bos, add_eos=add_eos)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)

    def get_vocab_size(self) -> int:
        return self.inner.get_vocab_size()


class ByteTokenizer(BaseTokenizer):
    """UTF-8 bytes are ids 0 to 255; 256 opens a document and 257 closes it."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config | None = None, *, tokenizer_path: str = ""):
        super().__init__()
        self.bos_id, self.eos_id = BOS, EOS

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return [BOS] * add_bos + list(text.encode("utf-8", "replace")) + [EOS] * add_eos

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < BYTES).decode("utf-8", "replace")

    def get_vocab_size(self) -> int:
        return BYTES + 2
