"""The cells of lift.ipynb, which `python -m tools.handbook.notebook` runs and writes with their output."""
# %% [markdown]
# # Fine-tune a policy on Lift
#
# The robot has to lift a cube. The shipped policy learned that from a few demonstrations and succeeds in six of ten
# episodes. PPO makes it better, while simulators collect the next rollout.

# %%
import tempfile
from pathlib import Path

import torch

import asyncflow as af

torch.set_num_threads(1)  # the simulators need the other cores

# %% [markdown]
# The policy comes with asyncflow. Its file says in which environment it learned: robot, controller and observations.

# %%
policy = af.load_policy("lift_flow")
env = af.make_env("Lift", num_envs=16, policy=policy)
print(env.spec.obs_keys, env.spec.action_dim, "numbers in an action;", policy.n_action_steps, "actions in a chunk")

# %% [markdown]
# A fixed number of episodes tells how good it is; the deterministic policy acts.

# %%
before = af.evaluate(policy, env, num_episodes=30)
print(f"success {before.success_rate:.0%}, between {before.success_low:.0%} and {before.success_high:.0%}")

# %% [markdown]
# The trainer collects rollouts of 960 decisions in a thread and trains on them. A callback sees every update.

# %%
num_updates = 4


def show(trainer: af.Trainer, row: dict[str, float]) -> None:
    """Print a line after every update."""
    print(
        f"update {row['updates']:2.0f}  {row['env_steps']:6.0f} env steps"
        f"  collector busy {row['async/collector_busy']:4.0%}  trainer busy {row['async/trainer_busy']:4.0%}"
        f"  policy lag {row['staleness/policy_lag_mean']:.0f}"
    )


ppo = af.PPO(policy, clip_coef=0.02, learning_rate=3e-4, lr_schedule="linear")
trainer = af.Trainer(policy, env, ppo, buffer_size=960, buffer_type="vla", callbacks=[show])
row = trainer.train(total_updates=num_updates)

# %% [markdown]
# `train` trains on when it is called again. The stop button ends it after the update under way; the trainer stays
# whole.

# %%
after = af.evaluate(policy, env, num_episodes=30)
print(f"success {after.success_rate:.0%}, between {after.success_low:.0%} and {after.success_high:.0%}")

# %% [markdown]
# A saved trainer goes on later, exactly where it was. `asyncflow eval` takes the folder, too.

# %%
folder = trainer.save(Path(tempfile.mkdtemp()) / "lift_trained")
trainer.close()
sorted(path.name for path in folder.iterdir())

# %%
with af.Trainer.resume(folder, callbacks=[show]) as trainer:
    trainer.train(total_updates=1)
