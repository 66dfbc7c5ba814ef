"""Texts that tokenizers are asked about: code, scripts, blanks, and where ways to split text differ."""

from __future__ import annotations

TEXTS = {
    "prose": "The quick brown fox doesn't jump; they'll say it's 12345 and 678.",
    "code": "def f(x):\n    if x == 1:\n\treturn [x, y]  # done\r\n\r\n\nclass A:\n        pass\n",
    "chinese": "Kimi 中文字符你好世界,北京市English混合。人工智能123年",
    "japanese": "日本語のテキスト、カタカナ。",
    "emoji": "ok 👍🏽 👨‍👩‍👧 🇨🇳 ½ ٣٤ ✓",
    "blanks": "  a   b\t\tc \n \n  d        \n\n\n",
    "letters": "Ünïcode ÉTÉ naïve straße привет мир Ελληνικά",
    "numbers": "1 12 123 1234 12345 1,234.56 0x1F 3.14e-10",
    "marks": "!!! ??? -> => != <= /* x */ // y ... --- ===",
    "contractions": "I'm we'LL you'd IT'S don't he've o'clock",
    "special": "<|im_user|>user<|im_middle|>hi<|im_end|>[BOS]<|tool_call_begin|>x",
    "json": '{"name": "f", "arguments": {"a": [1, 2, null]}}',
    "no text": "",
    "capitals inside": "helloWorld getElementById XMLHttpRequest theQuick",
    "marks on letters": "cafe\u0301 n\u0303o \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
}
"""By what they try."""
