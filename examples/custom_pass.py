"""A graph pass of your own among moeify's, and the same idea on the whole exported model.

    python examples/custom_pass.py

A pass is a frozen dataclass whose fields are its options; facts say when it can run. This one
clamps the experts' output, which keeps a half-precision model finite.
"""

import difflib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

import moeify as mf
from moeify import moeify
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of


def clamp_before(graph: fx.Graph, readers: list[fx.Node], limit: float) -> bool:
    """Clamp the first argument of each reader; return whether anything changed."""
    changed = False
    for reader in readers:
        hidden = reader.args[0]
        if hidden.target is torch.clamp:
            continue
        with graph.inserting_before(reader):
            clamped = graph.call_function(torch.clamp, (hidden, -limit, limit))
        reader.update_arg(0, clamped)
        changed = True
    return changed


@dataclass(frozen=True)
class ClampExperts:
    """Clamp the experts' output inside every MoE block.

    Args:
        limit: Largest absolute value.
    """

    limit: float = 100.0
    name: ClassVar[str] = "clamp-experts"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS})
    provides: ClassVar[frozenset[str]] = frozenset({"experts-clamped"})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        changed = False
        for _, block in blocks_of(gm):
            combines = block.graph.find_nodes(op="call_function", target=torch.ops.moeify.combine)
            changed |= clamp_before(block.graph, list(combines), self.limit)
        return PassResult(gm, changed)


def build() -> nn.Module:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    return nn.Sequential(mlp, nn.LayerNorm(32)).eval()


def main() -> None:
    x = torch.randn(8, 32)
    plan = {"layers": [{"select": "all", "experts": 4}]}

    plain = moeify(build(), plan, example_inputs=x)
    model = moeify(build(), plan, example_inputs=x, passes=[ClampExperts(limit=0.05)], verify=False)
    before, after = plain[0].code.splitlines(), model[0].code.splitlines()
    print("what the pass changed in the block's code:")
    for line in difflib.unified_diff(before, after, lineterm="", n=1):
        if line.startswith(("+ ", "- ", "  ")):
            print(line)
    print(f"\nlargest value the block returns: {model[0](x).abs().max():.3f}")
    print(f"and without the pass:            {plain[0](x).abs().max():.3f}")

    # moeify's passes may only change blocks; an exported graph can be changed anywhere.
    gm = mf.export(model, x)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clamp.default):
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    gm.recompile()
    same = torch.allclose(gm(x), plain(x), atol=1e-6)
    print(f"\nthe exported graph without the clamp gives the plain numbers again: {same}")


if __name__ == "__main__":
    main()
