"""Text from a checkpoint: the tokenizer that it brings, K2's own read without its code, and answers to prompts."""

from k2quant.model.generation.answers import Generation, generate, silence
from k2quant.model.generation.chats import ChatPrompt, Telling, chat_prompt
from k2quant.model.generation.tokenizers import load_tokenizer, open_tokenizer

__all__ = [
    "ChatPrompt",
    "Generation",
    "Telling",
    "chat_prompt",
    "generate",
    "load_tokenizer",
    "open_tokenizer",
    "silence",
]
