"""Damage packed checkpoints at random and kill processes that are saving them; a script, and the helpers of its tests.

    python tests/fuzz_checkpoint.py --count 5000 --kills 50

Every damaged folder must give a CheckpointError or, where the damage does not matter, a bit-equal model.
"""

import argparse
import json
import os
import random
import shutil
import signal
import struct
import tempfile
import time
from pathlib import Path

import torch

import vqlib  # noqa: F401, first: diffusers beside a CPU build of torch

# isort: split
from diffusers import DiTTransformer2DModel

from vqlib import CheckpointError, VQLinear, load_transformer, save
from vqlib.models.structure import quantizable, swap

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


def tiny_dit(seed=0, **changes):
    """A random DiT of two blocks of width 16 whose blocks hold equal embedders, as every real DiT's do."""
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 10}
    model = DiTTransformer2DModel(in_channels=4, out_channels=8, sample_size=8, **(sizes | changes)).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def pack(model, k=16, d=4, seed=0, shared=False, dtype=torch.float32):
    """Every linear of the blocks as a VQLinear with random codes; one codebook and per-layer scales if `shared`."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(k, d, generator=generator).to(dtype)
    for name, layer in quantizable(model).items():
        codewords = common if shared else (0.1 * torch.randn(k, d, generator=generator)).to(dtype)
        codes = torch.randint(0, k, (layer.weight.numel() // d,), generator=generator)
        scale = 0.01 + torch.rand((), generator=generator) if shared else 1.0
        swap(model, name, VQLinear.from_assignments(codes, codewords, tuple(layer.weight.shape), layer.bias, scale))
    return model


def forward(model):
    """The output for one fixed input, [2, 8, 8, 8]."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model(x, timestep=torch.tensor([3, 500]), class_labels=torch.tensor([1, 10])).sample


def same(a, b):
    """Whether two models hold bit-equal tensors under the same names."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def content(folder):
    """Header and data of a folder's weights, to compare two files: the library writes its metadata in any order."""
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def mutate(folder, rng):
    """Damage one file of a checkpoint in one random way; returns what was done."""
    file = folder / (CONFIG if rng.random() < 0.2 else WEIGHTS)
    data = bytearray(file.read_bytes())
    length = len(data)
    header = 8 + struct.unpack("<Q", data[:8])[0] if file.name == WEIGHTS else length
    place = rng.randrange(rng.choice((header, length)))  # half of the damage hits the header
    kind = rng.choice("bit byte cut append insert remove swap random zeros digit length gone".split())
    if kind == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[place] = rng.randrange(256)
    elif kind == "cut":
        del data[place:]
    elif kind == "append":
        data += rng.randbytes(rng.randrange(1, 100))
    elif kind == "insert":
        data[place:place] = rng.randbytes(rng.randrange(1, 20))
    elif kind == "remove":
        del data[place : place + rng.randrange(1, 20)]
    elif kind == "swap":
        other, width = rng.randrange(length), rng.randrange(1, 64)
        a, b = data[place : place + width], data[other : other + width]
        data[place : place + len(b)], data[other : other + len(a)] = b, a
    elif kind in ("random", "zeros"):
        width = min(rng.randrange(1, 200), length - place)
        data[place : place + width] = rng.randbytes(width) if kind == "random" else bytes(width)
    elif kind == "digit":  # well-formed JSON that says something else
        digits = [i for i in range(header) if 48 <= data[i] <= 57]
        data[rng.choice(digits)] = rng.randrange(48, 58)
    elif kind == "length":
        claims = (0, 1, length, length - 8, 1 << 31, (1 << 64) - 1, rng.getrandbits(64))
        data[:8] = struct.pack("<Q", rng.choice(claims))
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(data)
    return f"{kind} at {place} of {file.name}"


def fuzz(count, seed, folder, model, watch=lambda load: load()):
    """Load `count` damaged copies of one checkpoint; returns how many were refused. AssertionError on a wrong load."""
    rng, refused = random.Random(seed), 0
    good, bad = folder / "good", folder / "bad"
    save(model, good, {"source": "tiny", "seed": 0})
    for i in range(count):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        done = mutate(bad, rng)
        try:
            loaded = watch(lambda: load_transformer(bad))
        except CheckpointError as error:
            assert str(bad) in str(error), f"{done}: the message does not name the file: {error}"
            refused += 1
        else:
            assert same(loaded, model), f"mutation {i} of seed {seed} ({done}) loaded as another model"
    return refused


class PeakPerCall:
    """Bytes by which a call's resident peak passed what was resident before it, the largest of all calls. Linux only."""

    largest = 0

    def __call__(self, action):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = self._status("VmHWM")
        try:
            return action()
        finally:
            self.largest = max(self.largest, self._status("VmHWM") - before)

    @staticmethod
    def _status(name):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


def forge(folder, change):
    """Apply `change(tensors, manifest, config)` to a checkpoint and make every checksum fit again."""
    from safetensors.torch import load_file, save_file

    from vqlib.packed import container
    from vqlib.packed.header import FORMAT, read_header, sha256

    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    header = read_header(folder / WEIGHTS)
    manifest = {"format": FORMAT, "aliases": dict(header.aliases)}
    change(tensors, manifest, config)
    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    manifest["config"] = container.config_digest(config["_class_name"], settings, config["quantization_config"])
    manifest["tensors"] = {name: container._digest(tensor) for name, tensor in tensors.items()}
    text = json.dumps(manifest)
    metadata = {"format": "pt", "vqlib": text, "vqlib_sha256": sha256(text.encode())}
    save_file(tensors, folder / WEIGHTS, metadata)
    (folder / CONFIG).write_text(json.dumps(config))


def kill_while_saving(rounds, seed, folder):
    """Save two models over each other in a child that gets SIGKILL at a random moment; the folder must hold either."""
    rng, models, found = random.Random(seed), [pack(tiny_dit(i), seed=i) for i in (1, 2)], []
    target = folder / "target"
    save(models[1], target)  # here, not only in the child: saving rounds the model to what the file holds
    start = time.perf_counter()
    save(models[0], target)
    duration = time.perf_counter() - start
    for _ in range(rounds):
        started, ready = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the parent's worker threads do not exist in a forked child
                for i in range(10**6):
                    save(models[(i + 1) % 2], target)
                    if i == 0:
                        os.write(ready, b"x")
            finally:
                os._exit(1)
        os.read(started, 1)
        time.sleep(rng.uniform(0.0, 4 * duration))  # somewhere in one of the next four saves
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(started), os.close(ready)
        loaded = load_transformer(target)
        found.append([same(loaded, model) for model in models].index(True))
    return found


def size_of(folder):
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="damaged checkpoints to load")
    parser.add_argument("--kills", type=int, default=50, help="processes to kill while they save")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), pack(tiny_dit(), k=12, shared=True)
        start = time.perf_counter()
        refused = fuzz(arguments.count, arguments.seed, folder, model)
        print(
            f"{arguments.count} damaged checkpoints of {size_of(folder / 'good')} bytes: {refused} refused, "
            f"{arguments.count - refused} loaded bit-equal, 0 wrong; {time.perf_counter() - start:.0f} s"
        )
        model, watch = pack(tiny_dit(attention_head_dim=256, num_layers=4), k=256), PeakPerCall()
        fuzz(20, arguments.seed + 1, folder, model)  # imports and caches are in memory before it is measured
        fuzz(arguments.count // 20, arguments.seed + 2, folder, model, watch)
        size = size_of(folder / "good")
        print(
            f"{arguments.count // 20} damaged checkpoints of {size / 2**20:.1f} MiB: the resident peak of one load grew by "
            f"at most {watch.largest / 2**20:.1f} MiB, {watch.largest / size:.2f} × the files"
        )
        found = kill_while_saving(arguments.kills, arguments.seed, folder)
        print(f"{arguments.kills} kills while saving: {found.count(0)} left one model, {found.count(1)} the other")


if __name__ == "__main__":
    main()
