"""Which lm-eval this is: answers depend on it."""

from __future__ import annotations

import lm_eval

VERSION: str = lm_eval.__version__
