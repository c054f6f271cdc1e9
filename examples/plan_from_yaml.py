"""A plan from a file, for a model that is not from Hugging Face.

    python examples/plan_from_yaml.py

`resolve` shows what the plan makes of the model and changes nothing. An error in a plan names the
place.
"""

from pathlib import Path

import torch
from torch import nn

import moeify as mf
from moeify import Plan, PlanError, moeify

FILE = Path(__file__).with_name("pr-moe.yaml")


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=6, enable_nested_tensor=False).eval()
    x = torch.randn(2, 10, 64)

    for site in mf.find_mlps(model, x):
        print(site)

    plan = Plan.load(FILE)
    print(plan.resolve(model, x))

    with torch.no_grad():
        dense = model(x)
        moeify(model, plan, example_inputs=x)
        difference = (model(x) - dense).abs().max()
    print(f"\nlargest difference to the dense model: {difference:.1e}")

    try:
        Plan.loads(FILE.read_text().replace("residual:", "residuals:"), file="pr-moe.yaml")
    except PlanError as error:
        print(f"\na typo is reported like this:\n{error}")


if __name__ == "__main__":
    main()
