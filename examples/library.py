"""Fine-tune in a program, without a configuration: train, watch, evaluate, save, go on.

python examples/library.py            # Lift with the shipped policy, two minutes on two cores
python examples/library.py Toy 3      # the toy from scratch, 3 updates
"""

import sys
import tempfile

import torch

import asyncflow as af


def watch(trainer: af.Trainer, row: dict[str, float]) -> None:
    """Print a line after every update, and end training once nine of ten episodes succeed."""
    success = row.get("rollout/success_rate", 0.0)
    print(f"update {row['updates']:.0f}: {row['env_steps']:.0f} env steps, {100 * success:.0f} % success")
    if success > 0.9:
        raise af.StopTraining


def main(task: str = "Lift", num_updates: int = 16) -> af.EvalResult:
    """Train, evaluate, save, and train on from what was saved."""
    torch.set_num_threads(1)  # the simulators need the other cores
    if task == "Lift":
        policy = af.load_policy("lift_flow")
        env = af.make_env(task, num_envs=16, policy=policy)
    else:
        env = af.make_env(task, num_envs=16)
        policy = af.make_policy("gaussian", env, log_prob="joint_sum")
    ppo = af.PPO(policy, clip_coef=0.02, learning_rate=3e-4)
    with tempfile.TemporaryDirectory() as folder:
        with af.Trainer(policy, env, ppo, buffer_size=960, buffer_type="vla", callbacks=[watch]) as trainer:
            trainer.train(total_updates=num_updates)
            saved = trainer.save(f"{folder}/trained")
        with af.Trainer.resume(saved, callbacks=[watch]) as trainer:
            trainer.train(total_updates=1)
            result = af.evaluate(trainer.policy, task, num_episodes=16)
    print(f"success {result.success_rate:.3f}, between {result.success_low:.3f} and {result.success_high:.3f}")
    return result


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(sys.argv[1], int(sys.argv[2]))
    else:
        main()
