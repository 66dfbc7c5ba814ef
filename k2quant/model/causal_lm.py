"""The model that `load_model` gives: transformers' DeepSeek-V3, which can write its checkpoint back byte for byte."""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV3ForCausalLM

from k2quant.errors import UsageError
from k2quant.model.assembly import Assembled
from k2quant.model.saving import save_pretrained


class K2ForCausalLM(Assembled, DeepseekV3ForCausalLM):
    """transformers' DeepSeek-V3 with the weights of a K2 checkpoint, which it can write back byte for byte."""

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        """Take weights over under the checkpoint's names.

        Raises:
            UsageError: a part of the model waits elsewhere, where it cannot be changed.
        """
        self._refuse_waiting_parts("load weights into")
        return super().load_state_dict(state_dict, *args, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  torch's signature
        self._refuse_waiting_parts("move or cast")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _refuse_waiting_parts(self, what: str) -> None:
        places = getattr(self, "hf_device_map", None)
        waiting = next((name for name, tensor in self.named_parameters() if places and tensor.is_meta), None)
        if waiting is not None:
            raise UsageError(f"cannot {what} a model whose `{waiting}` waits on disk or in memory; load it whole")

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Answer for the modules of experts, which are not in the file where transformers looks for them."""
        return True

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Write the checkpoint; see `k2quant.model.save_model`. No other option of transformers has a meaning here."""
        save_pretrained(self, save_directory, *args, **options)
