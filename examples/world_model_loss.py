"""The world-model term in somebody else's trainer: log-probabilities and two masks, nothing more.

python examples/world_model_loss.py
"""

import torch

from backtalk.objective import world_model_loss_from_masks

# Two rollouts, position t scores token t. In the first the harness wrote token 1 and the world tokens 2 and 3;
# in the second the world wrote token 1.
logprobs_BT = torch.tensor([[-0.5, -9.0, -1.0, -3.0], [-0.2, -2.0, -0.1, -0.1]], requires_grad=True)
env_mask_BT = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)
warning_mask_BT = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)

for normalizer in ("sequence_mean", "sequence_mean_selected", "token_mean"):
    loss = world_model_loss_from_masks(logprobs_BT, env_mask_BT, warning_mask_BT, normalizer=normalizer)
    (gradient_BT,) = torch.autograd.grad(loss, logprobs_BT)
    weights = (-gradient_BT[env_mask_BT]).tolist()
    print(f"{normalizer:<23} {loss.item():.4f} nats, weights of the world's three tokens {weights}")
