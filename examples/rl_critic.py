"""CrossQ with Stable-Baselines3's SAC: no target networks, Batch Renormalization in the critics.

    python examples/rl_critic.py --steps 20000

Bhatt et al. (ICLR 2024, https://arxiv.org/abs/1902.05605): batch norm in a critic fails because the actions of the
replay buffer and those of the present policy are two distributions. CrossQ sends both through the critic in one
batch, so that one set of statistics is of both, and then needs no target networks. The environment is gymnasium's
Pendulum.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.sac.policies import SACPolicy
from torch import Tensor, nn

import batchrenorm as brn


class CrossQPolicy(SACPolicy):
    """SAC's policy whose critics normalise the input of every linear layer."""

    def __init__(self, *args: Any, clip: brn.ClipSchedule, **kwargs: Any) -> None:
        self.clip = clip
        super().__init__(*args, **kwargs)

    def make_critic(self, features_extractor: nn.Module | None = None) -> Any:
        critic = super().make_critic(features_extractor)
        for number, network in enumerate(critic.q_networks):
            layers: list[nn.Module] = []
            for layer in network:
                if isinstance(layer, nn.Linear):
                    layers.append(brn.BatchRenorm1d(layer.in_features, clip=self.clip).to(self.device))
                layers.append(layer)
            critic.q_networks[number] = critic._modules[f"qf{number}"] = nn.Sequential(*layers)
        return critic


class CrossQ(SAC):
    """SAC without targets: Q of this step and of the next are one forward of one critic."""

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        for _ in range(gradient_steps):
            data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            alpha = self.log_ent_coef.detach().exp()  # type: ignore[union-attr]
            with torch.no_grad():
                next_actions, next_log_prob = self.actor.action_log_prob(data.next_observations)
            self.critic.train()
            both = self.critic(
                torch.cat([data.observations, data.next_observations]).float(),
                torch.cat([data.actions, next_actions]).float(),
            )
            now, later = zip(*(q.chunk(2) for q in both))
            value = torch.cat(later, 1).min(1, keepdim=True).values.detach() - alpha * next_log_prob[:, None]
            target = data.rewards + (1 - data.dones) * self.gamma * value
            self._step(self.critic.optimizer, sum(F.mse_loss(q, target) for q in now))

            # The actor asks a critic that predicts: its averages stay.
            self.critic.eval()
            actions, log_prob = self.actor.action_log_prob(data.observations)
            q = torch.cat(self.critic(data.observations, actions), 1).min(1).values
            self._step(self.actor.optimizer, (alpha * log_prob - q).mean())
            self._step(self.ent_coef_optimizer, -(self.log_ent_coef * (log_prob + self.target_entropy).detach()).mean())

    @staticmethod
    def _step(optimizer: Any, loss: Tensor | int) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and return the mean reward of some episodes and the critic's training forwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="of the environment, as many of training")
    parser.add_argument("--episodes", type=int, default=10, help="to evaluate on")
    options = parser.parse_args(arguments)
    # A linear ramp over the run; the authors' own code switches from 1, 0 to 3, 5 at once, after 100,000 steps.
    clip = brn.ClipSchedule.for_training(options.steps)
    model = CrossQ(
        CrossQPolicy, "Pendulum-v1", learning_rate=1e-3, learning_starts=min(1_000, options.steps // 4),
        policy_kwargs={"clip": clip, "net_arch": [256, 256]}, device="cpu", seed=0,
    )  # fmt: skip
    model.learn(options.steps)
    reward, spread = evaluate_policy(model, model.get_env(), n_eval_episodes=options.episodes, warn=False)
    layer = next(m for m in model.critic.modules() if isinstance(m, brn.BatchRenorm))
    forwards = int(layer.num_batches_tracked)
    print(f"mean reward {reward:.0f} ± {spread:.0f}; the critic has seen {forwards} training forwards")
    return {"reward": float(reward), "forwards": forwards}


if __name__ == "__main__":
    main()
