"""What a network makes around its decoder is compared, too: masks and positions of its own, and each way to attend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from causal_types.small_models import small_network
from model.test_proof import CPU, proof_of
from trietune.errors import UserError
from trietune.model.architecture import why_whole_rows
from trietune.model.causal_lm import TrieModel

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def prove(network: Any, attention: Any = "rows") -> Any:
    return proof_of(TrieModel(network, device=CPU, attention=attention, why_whole_rows=why_whole_rows(network)))


@pytest.mark.parametrize("attention", ["rows", None])
def test_a_network_that_is_causal_under_one_way_to_attend_only_is_refused(attention: str | None) -> None:
    """Without token types, transformers gives PaliGemma a causal mask under `eager` and none under `sdpa`."""
    network = small_network("paligemma").eval()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        logits = []
        for way in ("eager", "sdpa"):
            network.set_attn_implementation(way)
            logits.append(network(input_ids=ids).logits)
    assert (logits[0] - logits[1]).norm() > 0.1 * logits[0].norm(), "transformers' two ways agree by now"
    with pytest.raises(UserError, match="ways to attend disagree on it: under `sdpa`"):
        prove(small_network("paligemma"), attention)


@pytest.mark.parametrize("attention", ["rows", None])
def test_a_network_that_gives_its_decoder_positions_of_its_own_is_refused(
    attention: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prove(small_network("gpt2"), attention).lines
    kind = type(small_network("gpt2"))
    right = kind.forward

    def forward(self: Any, input_ids: torch.Tensor, **how: Any) -> Any:
        return right(self, input_ids=input_ids, position_ids=torch.arange(3, 3 + input_ids.shape[1])[None], **how)

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(UserError, match="gives its decoder masks or positions of its own"):
        prove(small_network("gpt2"), attention)
