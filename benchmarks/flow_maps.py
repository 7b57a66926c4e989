"""Every few-step method on data whose distribution is known: three Gaussians in the plane, a small network.

    python -m benchmarks.flow_maps

Prints the sliced Wasserstein distance of samples to the data at 1, 2 and 4 network calls, beside DDIM with the teacher,
and beside that of fresh data. Mean and deviation over seeds of training.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import quick
from diffusion_jax import build, codec
from diffusion_jax.conditioning import unconditional
from diffusion_jax.core import parameterization, sampling, schedules, solvers
from diffusion_jax.model import DiffusionModel, Network
from diffusion_jax.objectives import few_step_methods, flow_map
from diffusion_jax.objectives.denoising import denoising
from diffusion_jax.objectives.levels import uniform_weight

MEANS = np.array([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]])
STDS, WEIGHTS = np.array([0.3, 0.4, 0.2]), np.array([0.5, 0.3, 0.2])
SHAPE, WIDTH, BATCH = (1, 1, 2), 128, 1024
SAMPLES, DIRECTIONS = 20_000, 64
CALLS = (1, 2, 4)
SEEDS = 3
STAGES = (8, 4, 2, 1)  # segments of progressive distillation
# without the robust loss of the presets, which in two dimensions moves a target's mean towards its mode
METHODS = {  # -> method, options, solver, whether it needs the teacher
    "consistency_distillation": (few_step_methods.consistency_distillation(64), {}, solvers.consistency, True),
    "consistency_training": (few_step_methods.consistency_training(), {}, solvers.consistency, False),
    "soflow": (few_step_methods.soflow(), {"plain": 0.5}, solvers.ddim, False),
    "shortcut": (few_step_methods.shortcut(), {"plain": 0.5}, solvers.ddim, False),
    "mean_flow": (few_step_methods.mean_flow(), {"plain": 0.5}, solvers.ddim, False),
    "continuous_consistency": (few_step_methods.continuous_consistency(), {}, solvers.consistency, False),
    "lagrangian": (few_step_methods.lagrangian(), {"plain": 0.5}, solvers.ddim, False),
    "consistency_training, taught": (few_step_methods.consistency_training(), {}, solvers.consistency, True),
    "soflow, taught": (few_step_methods.soflow(), {"plain": 0.5}, solvers.ddim, True),
    "mean_flow, taught": (few_step_methods.mean_flow(), {"plain": 0.5}, solvers.ddim, True),
    "continuous_consistency, taught": (few_step_methods.continuous_consistency(), {}, solvers.consistency, True),
}


def data(key: jax.Array, count: int) -> jax.Array:
    component_key, noise = jax.random.split(key)
    component = jax.random.choice(component_key, len(WEIGHTS), (count,), p=jnp.asarray(WEIGHTS))
    x = jnp.asarray(MEANS)[component] + jnp.asarray(STDS)[component][:, None] * jax.random.normal(noise, (count, 2))
    return x.reshape(count, *SHAPE).astype(jnp.float32)


def waves(t: jax.Array) -> jax.Array:
    angles = t[:, None] * jnp.pi / 1000 * jnp.array([0.5, 1.0, 2.0, 4.0])
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def network(params: dict, x: jax.Array, t: jax.Array, cond: dict, keys=None) -> jax.Array:
    h = x.reshape(len(x), 2) @ params["x"] + waves(t) @ params["t"]
    if "to" in cond:
        h = h + waves(cond["to"]) @ params["to"]
    for kernel, bias in params["layers"]:
        h = jax.nn.silu(h)
        h = h + h @ kernel + bias
    return (h @ params["out"]).reshape(x.shape)


def initial(key: jax.Array) -> dict:
    keys = jax.random.split(key, 6)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5  # noqa: E731
    layers = [(normal(keys[i], WIDTH, WIDTH), jnp.zeros(WIDTH)) for i in range(3)]
    parts = {"x": normal(keys[3], 2, WIDTH), "t": normal(keys[4], 8, WIDTH), "to": jnp.zeros((8, WIDTH))}
    return parts | {"layers": layers, "out": jnp.zeros((WIDTH, 2))}


def model(is_map: bool) -> DiffusionModel:
    net = Network(network, initial, flow_map=is_map)
    data_codec = codec.identity()._replace(limit=None)
    prediction = parameterization.flow
    return DiffusionModel(net, None, schedules.flow(), prediction, data_codec, unconditional(), (1, 1))


def trained(loss, params: dict, frozen: dict, steps: int, key: jax.Array, rate: float = 2e-3) -> dict:
    """The averaged weights after training."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, number):
        params, average, state = carry
        keys = jax.random.split(jax.random.fold_in(key, number), BATCH + 1)
        batch = {"latent": data(keys[0], BATCH), "cond": {}}
        grads = jax.grad(lambda p: loss(p, frozen | {"step": number}, batch, keys[1:])[0])(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, average, 0.005), state), None

    start = (params, params, optimizer.init(params))
    return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps)))()[0][1]


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Sliced Wasserstein distance of order 2 of as many points."""
    angles = np.linspace(0, np.pi, DIRECTIONS, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    projected = (np.sort(points.reshape(-1, 2) @ directions, axis=0) for points in (x, y))
    a, b = projected
    return float(np.sqrt(np.mean((a - b) ** 2)))


def main() -> None:
    small = quick.parser(__doc__).parse_args().quick
    quick.note(small)
    steps, samples, seeds = (5, 100, 1) if small else (3000, SAMPLES, SEEDS)
    rows: dict[str, list] = {}
    for seed in range(seeds):
        keys = jax.random.split(jax.random.key(seed), 5)
        real, fresh = (np.asarray(data(key, samples)) for key in keys[:2])
        frozen = {"codec": {}, "conditioning": None, "null_cond": {}, "rest": {}}
        teacher = model(is_map=False)
        params = initial(keys[2])
        params = trained(denoising(teacher, uniform_weight, 0.0), params, frozen, steps, keys[3])
        teacher = teacher._replace(params=params)

        def measured(sampled_model: DiffusionModel, params: dict, solver, calls: int) -> float:
            plan = solver(sampled_model.useful_schedule, calls)
            noise_keys = jax.random.split(keys[4], samples)  # noqa: B023
            x = sampling.initial_noise(noise_keys, SHAPE, plan.start)
            return distance(np.asarray(sampling.sample(sampled_model.denoiser(params), plan, x, noise_keys, {})), real)  # noqa: B023

        rows.setdefault("fresh data", []).append([distance(fresh, real)] * len(CALLS))
        rows.setdefault("DDIM", []).append([measured(teacher, params, solvers.ddim, n) for n in CALLS])
        rows.setdefault("DDIM, 50 calls", []).append([measured(teacher, params, solvers.ddim, 50)] * len(CALLS))
        stage, by_calls = teacher, {}
        for segments in STAGES:
            student = model(is_map=True)
            method = few_step_methods.distillation(segments)
            loss = flow_map.flow_map(student, method, steps, drop=0.0, teacher=flow_map.Teacher(stage))
            frozen_parts = frozen | {"teacher": stage.params}
            learned = trained(loss, stage.params, frozen_parts, max(steps // len(STAGES), 1), keys[3], rate=1e-3)
            stage = student._replace(params=learned)
            by_calls[segments] = measured(student, learned, solvers.ddim, segments)
        rows.setdefault("distillation, in stages", []).append([by_calls[n] for n in CALLS])
        for name, (method, options, solver, needs) in METHODS.items():
            student = model(is_map=True)
            guide = flow_map.Teacher(teacher, defines_path=name.endswith("taught")) if needs else None
            emphasis = build.objective.emphasis(name.split(",")[0])
            loss = flow_map.flow_map(student, method, steps, drop=0.0, teacher=guide, emphasis=emphasis, **options)
            frozen_parts = frozen | ({"teacher": params} if needs else {})
            learned = trained(loss, params, frozen_parts, steps, keys[3], rate=1e-3)
            rows.setdefault(name, []).append([measured(student, learned, solver, n) for n in CALLS])
    print(f"| method | {' | '.join(f'{n} calls' for n in CALLS)} |\n|{'---|' * (1 + len(CALLS))}")
    for name, values in rows.items():
        mean, spread = np.mean(values, axis=0), np.std(values, axis=0)
        print(f"| {name} | {' | '.join(f'{m:.3f} ± {s:.3f}' for m, s in zip(mean, spread, strict=True))} |")


if __name__ == "__main__":
    main()
