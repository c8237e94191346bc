"""PPO with the Gaussian policy on gymnasium's tasks, beside stable-baselines3's PPO: what both learn."""
