"""Compares two commits bit by bit: codes, scales, logits and files of every recipe.

    python tests/project/compare_commits.py OLD [--recipes int8 w8a8 ...] [--fast]

OLD is a commit. The other side is the working tree. Each side runs in a process of its
own, on the same machine, with the same packages:

1. The bundled model is quantized with every named recipe. All arrays of the result, and
   its logits on held-out text, are hashed.
2. The old side saves each quantized model, and the new side loads the files.
3. A matrix is quantized with every preset.

The script prints every difference and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def digest(array) -> str:
    """Dtype, shape and a hash of the bytes."""
    import jax
    import numpy as np

    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    value = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8)
    return f"{array.dtype}{list(array.shape)} {value.hexdigest()}"


def digests(tree) -> dict[str, str]:
    """The digest of every array of a tree, by path."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): digest(leaf) for path, leaf in leaves}


def data(tokenizer, name: str, count: int):
    """Windows of 128 tokens of the held-out text; "calibration" uses its end."""
    import numpy as np

    text = (ROOT / "examples" / "heldout.txt").read_text()
    half = len(text) // 2
    text = text[half:] if name == "calibration" else text[:half]
    tokens = np.asarray(tokenizer.encode(text).ids[: count * 128], np.int32)
    return tokens.reshape(-1, 4, 128)


def run_side(folder: Path, recipes: list[str], saves: bool, fast: bool) -> dict:
    """The digests of one side; the old side also saves every quantized model."""
    import jax
    from flax import nnx

    import jaxq

    model, tokenizer = jaxq.models.load(ROOT / "examples" / "tiny_llama")
    batches = list(data(tokenizer, "calibration", 8 if fast else 32))
    tokens = data(tokenizer, "logits", 4)[0]
    logits = nnx.jit(lambda model, tokens: model(tokens))
    sides: dict = {"recipes": {}, "files": {}, "presets": {}}
    for name in recipes or jaxq.recipes.names():
        recipe = jaxq.recipes.get(name)
        # Data only where they are needed, so that weight-only recipes stay fast.
        last = recipe.rules[-1]
        needs_data = recipe.rotate or last.observer or last.method != "rtn"
        qmodel, report = jaxq.quantize_model(
            model, name, calibration=batches if needs_data else None
        )
        sides["recipes"][name] = {
            **digests(nnx.state(qmodel)),
            "logits": digest(logits(qmodel, tokens)),
            "bytes": report.bytes_after,
        }
        file = folder / f"{name}.safetensors"
        # Rotated models need an empty model of the same rotation to load into.
        if not recipe.rotate:
            if saves:
                jaxq.save(file, qmodel)
            loaded = jaxq.load(file, into=model)
            sides["files"][name] = digest(logits(loaded, tokens))
        print(f"  {name}", file=sys.stderr, flush=True)
    w = jax.random.normal(jax.random.key(0), (256, 48))
    for name in jaxq.presets():
        qt = jaxq.quantize(w, name)
        sides["presets"][name] = {
            **digests(qt),
            "floats": digest(jaxq.dequantize(qt)),
        }
    return sides


def differences(old: dict, new: dict, path: str = "") -> list[str]:
    """Every path at which the two sides have another value."""
    lines = []
    for key in sorted({*old, *new}):
        where = f"{path}/{key}"
        left, right = old.get(key, "missing"), new.get(key, "missing")
        if isinstance(left, dict) and isinstance(right, dict):
            lines += differences(left, right, where)
        elif left != right:
            lines.append(f"{where}: {left} before, {right} now")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="a commit")
    parser.add_argument("--recipes", nargs="*", default=[], help="names; default: all")
    parser.add_argument("--fast", action="store_true", help="less calibration data")
    parser.add_argument("--side", choices=("old", "new"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        saves = options.side == "old"
        sides = run_side(options.folder, options.recipes, saves, options.fast)
        (options.folder / f"{options.side}.json").write_text(json.dumps(sides))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive = folder / "old"
        archive.mkdir()
        command = f"git -C '{ROOT}' archive {options.old} jaxq | tar -x -C '{archive}'"
        subprocess.run(command, shell=True, check=True)
        for side, source in (("old", archive), ("new", ROOT)):
            print(f"{side}: {source}", file=sys.stderr, flush=True)
            arguments = [options.old, "--side", side, "--folder", str(folder)]
            arguments += ["--fast"] if options.fast else []
            arguments += ["--recipes", *options.recipes] if options.recipes else []
            environment = {**os.environ, "PYTHONPATH": str(source)}
            script = str(Path(__file__))
            subprocess.run(
                [sys.executable, script, *arguments],
                cwd=folder,
                env=environment,
                check=True,
            )
        old, new = (
            json.loads((folder / f"{side}.json").read_text()) for side in ("old", "new")
        )
    lines = differences(old, new)
    print("\n".join(lines) or "no difference")
    for kind, entries in new.items():
        print(f"{kind}: {len(entries)} compared")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
