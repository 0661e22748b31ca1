"""The other side of model_speed.py: lucidrains' `retro-pytorch`, in an environment of its own.

model_speed.py starts it with the sizes as JSON and writes lines to it, `step` or `generate`; each is done once and answered with a
line of JSON on stdout. It imports nothing of ours.

It is compared at the same sizes: `RETRO` does not pass `heads` on, so it has always 8; one table serves input and output, as in
our own presets (two would be 8 million more weights to update). Its look-up of neighbors wants tokenizer and BERT of torch.hub's
`huggingface/pytorch-transformers`, so `TrainingWrapper.generate` gets a function that returns given tokens at once.
"""

import contextlib
import importlib.metadata
import io
import json
import sys
import time
from typing import Any

import torch
from retro_pytorch import RETRO, TrainingWrapper  # type: ignore[import-not-found]
from retro_pytorch.retrieval import EOS_ID  # type: ignore[import-not-found]


class Peer:
    """A network, a batch to train on, a prompt to continue."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        torch.set_num_threads(sizes["threads"])
        torch.manual_seed(0)
        if sizes["num_heads"] != 8:
            raise ValueError(f"num_heads = {sizes['num_heads']}: retro-pytorch has always 8")
        self.sizes = sizes
        self.clock = time.process_time if sizes["cpu_seconds"] else time.perf_counter
        self.retro = self.network(sizes["seq_len"])
        self.parameters = sum(p.numel() for p in self.retro.parameters())
        self.optimizer = torch.optim.AdamW(self.retro.parameters(), lr=1e-4, fused=True)
        B, T, M = sizes["batch"], sizes["seq_len"], sizes["chunk_len"]
        K, R, V = sizes["num_neighbors"], sizes["neighbor_len"], sizes["vocab_size"]
        self.ids = torch.randint(1, V, (B, T + 1))
        self.neighbors = torch.randint(1, V, (B, T // M, K, R))
        self.prompt = torch.tensor([sizes["prompt"]])
        self.found = torch.tensor([sizes["found"]])

    def network(self, seq_len: int) -> Any:
        sizes = self.sizes
        retro = RETRO(
            num_tokens=sizes["vocab_size"],
            max_seq_len=seq_len,
            enc_dim=sizes["dim"],
            enc_depth=sizes["encoder_layers"],
            enc_cross_attn_layers=(1,),
            dec_dim=sizes["dim"],
            dec_depth=sizes["num_layers"],
            dec_cross_attn_layers=tuple(sizes["cca_layers"]),
            dim_head=sizes["head_dim"],
            chunk_size=sizes["chunk_len"],
        )
        torch.nn.init.normal_(retro.token_emb.weight, std=0.02)
        retro.to_logits.weight = retro.token_emb.weight
        return retro

    def step(self) -> float:
        """Seconds of one training step."""
        started = self.clock()
        self.optimizer.zero_grad(set_to_none=True)
        self.retro.train()
        loss = self.retro(self.ids, retrieved=self.neighbors, return_loss=True)
        loss.backward()
        self.optimizer.step()
        return self.clock() - started

    def generate(self) -> float:
        """Seconds for the new tokens after the prompt, the most probable one each time."""
        length = self.prompt.shape[1] + self.sizes["new_tokens"]
        wrapper = TrainingWrapper.__new__(TrainingWrapper)  # its constructor wants a corpus and BERT
        torch.nn.Module.__init__(wrapper)
        wrapper.retro = self.network(length).eval()
        with torch.no_grad():
            wrapper.retro.to_logits.bias[EOS_ID] = -1e9  # it would end there
        wrapper.chunk_size, wrapper.max_seq_len = self.sizes["chunk_len"], length - 1
        wrapper.fetch_knn_chunks_fn = lambda chunks: self.found.expand(len(chunks), -1, -1)
        started = self.clock()
        out = wrapper.generate(self.prompt, filter_thres=1 - 1 / self.sizes["vocab_size"])
        seconds = self.clock() - started
        if out.shape[1] != length:
            raise RuntimeError(f"{out.shape[1]} tokens instead of {length}")
        return seconds


def main() -> None:
    peer = Peer(json.loads(sys.argv[1]))
    names = ("retro-pytorch", "torch", "numpy", "einops")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps({"versions": versions, "parameters": peer.parameters}), flush=True)
    for line in sys.stdin:
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints
            seconds = peer.step() if line.strip() == "step" else peer.generate()
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
