"""The whole rewritten model as one graph, for further passes, other runtimes, or reading.

    python examples/export_graph.py

The graph runs at any batch size and length, trains, pickles, and compiles without a break.
"""

import pickle

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import moeify as mf
from moeify import moeify

PLAN = {
    "layers": [{"select": {"every": 2, "start": 1}, "experts": 4, "residual": "coefficient"}],
    "router": {"aux_loss": 0.01},
}


def main() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = moeify(GPT2LMHeadModel(config), PLAN).eval()

    gm = mf.export(model)
    nodes = list(gm.graph.nodes)
    ours = [node for node in nodes if str(node.target).startswith("moeify.")]
    print(f"{type(model).__name__}: {len(nodes)} nodes, {len(ours)} of them moeify's:")
    for node in ours:
        path, _ = list(node.meta["nn_module_stack"].values())[-1]
        print(f"  {node.target!s:32} {path}")

    ids = torch.randint(0, config.vocab_size, (5, 33))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        eager = model(**inputs, use_cache=False)
        graph = gm(**inputs)
    print(f"\nat {tuple(ids.shape)}, exported at (2, 8), it returns {type(graph).__name__}")
    difference = (graph.logits - eager.logits).abs().max()
    print(f"largest difference of the logits to the model: {difference:.1e}")

    again = pickle.loads(pickle.dumps(gm))
    print(f"equal after pickling: {torch.equal(again(**inputs).logits, graph.logits)}")

    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    (compiled(**inputs).logits.mean() + mf.aux_loss(compiled)).backward()
    gradient = model.transformer.h[1].mlp.router.weight.grad.norm()
    print(f"gradient at the model's own router, through the compiled graph: {gradient:.1e}")


if __name__ == "__main__":
    main()
