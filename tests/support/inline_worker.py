"""Fake simulators in any run, and workers without processes: starting one takes no time."""

import traceback

import fake_simulator

from asyncflow.envs import workers
from asyncflow.envs.worker import WorkerFailure
from asyncflow.simulators import worker


class Died(BaseException):
    """The process would have ended."""


class InlineWorker:
    """It obeys at once, in the process of the test. After its death or an exception it answers nothing more."""

    def __init__(self, index, env_ids, setup, waker):
        self.index, self.env_ids, self.versions = index, env_ids, {}
        self._setup, self._runners, self._answers, self._failure = setup, {}, {}, None
        self._attempt("ready", self._construct)

    def wait_ready(self):
        return self.receive("ready", 0.0)

    def begin(self, key, seed, episodes):
        self._obey(key, {"command": "begin", "seed": seed, "episodes": list(episodes.items())})

    def step(self, key, envs):
        self._obey(key, {"command": "step", "envs": list(envs.items())})

    def _obey(self, key, message):
        self._attempt(key, lambda: worker.obey(self._runners, message))

    def receive(self, key, timeout_s):
        if key not in self._answers:
            raise self._failure
        return self._answers.pop(key)

    def dismiss(self):
        self._answers.clear()
        self._failure = self._failure or WorkerFailure("died", f"worker {self.index} was dismissed")

    def stop(self, deadline):
        self.dismiss()

    def _construct(self):
        setup = self._setup
        make = [worker.find_factory(each) for each in setup.factories]
        self._runners = {env: worker.build_runner(make, setup.seed, env, setup.board.memory) for env in self.env_ids}
        return worker.describe(self._runners, len(make))

    def _attempt(self, key, work):
        if self._failure is not None:
            return
        try:
            self._answers[key] = work()
        except Died:
            self._failure = WorkerFailure("died", f"worker {self.index} died")
        except Exception as error:
            self._failure = WorkerFailure("raised", f"worker {self.index} raised {error}", traceback.format_exc())


def simulators(make_simulator):
    """Return a `make_vec_env` that puts these simulators, whatever the task, into workers."""

    def make(config, chunk_length, num_envs, seed):
        return workers.WorkerVecEnv(make_simulator, config, num_envs, chunk_length, seed)

    return make


def work_inline(monkeypatch):
    """Let every `WorkerVecEnv` of a test have such workers."""

    def die():
        raise Died

    monkeypatch.setattr(workers, "Worker", InlineWorker)
    monkeypatch.setattr(fake_simulator, "die", die)
