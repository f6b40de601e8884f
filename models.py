"""Everything about models that is not GRPO: what families differ in, loading, adapters, shards, saving, checkpoints.

Functions here take models, folders and plain settings. They know no task, no reward and no loss, so that any method
of training can use them; what a run is made of is put together in virft.py.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available

import data
from data import DataError

# ------------------------------------------------------------------------------------------------
# What families differ in. It is asked of the model and of its cache; none is known by name.


def told_positions(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Position ids [B, P] for a left-padded prompt, mask [B, P], as an argument of the model: padding would shift its own.

    Models with several rotary axes (Qwen-VL, GLM-V) are told none: they derive them from mask and image grids.
    """
    return {} if rotary_offset(model) else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def next_position(model: nn.Module, mask: Tensor) -> Tensor:
    """Position id of the token that follows each prompt which the model has just read, [B, 1] or [3, B, 1]."""
    length, several_axes = mask.sum(1, keepdim=True), rotary_offset(model)  # [B, 1], padding not counted
    # Text advances alike on all three axes; an image takes fewer positions than it has tokens.
    return (length + several_axes.rope_deltas).expand(3, -1, -1) if several_axes else length


def rotary_offset(model: nn.Module) -> nn.Module | None:
    """The part of a model with several rotary axes that notes by how much the next position differs from the length."""
    return next((part for part in model.modules() if hasattr(part, "rope_deltas")), None)


def shares_prompt(model: nn.Module) -> bool:
    """Whether completions can be scored from one encoded prompt: not where a state in the cache is overwritten.

    With linear attention each token replaces the state, which leaves autograd without the earlier values, and fused
    kernels that take single steps from it may have no gradient. Sampling needs none, and shares all the same.
    """
    return not any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=model.config).layers)


def repeated_logits(model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, group_size: int) -> Tensor:
    """Logits [B * G, C, V] that predict ids [B * G, C], from one forward over G copies of each prompt and no cache.

    What `prefill` and `branch` save, for models that do not share. The whole batch is copied G times, one after the
    other, because only so the images stay in the order of their prompts whatever the shape that a processor gave them.
    """
    row = torch.arange(len(ids), device=ids.device).view(-1, group_size).T.flatten()  # [G * B], copy by copy
    P, C, sequence = inputs["input_ids"].shape[1], ids.shape[1], {}
    for name, x in inputs.items():
        sequence[name] = torch.cat([x] * group_size)
        if x.shape[:2] == inputs["input_ids"].shape:  # said of each token: a completion's are like the prompt's last
            sequence[name] = torch.cat([sequence[name], sequence[name][:, -1:].repeat_interleave(C, 1)], 1)
    sequence["input_ids"][:, P:] = ids[row]
    # No position ids: in one forward padding shifts all of a row alike, and rotary positions count by their difference.
    logits = model(**sequence, use_cache=False, logits_to_keep=C + 1).logits[:, :-1]
    return logits[row.argsort()]


class CommonPromptLayer(DynamicLayer):
    """A layer's keys and values while completions are sampled: of each prompt once, of each completion its own tokens.

    Reading G copies of the prompt for every token took sampling a quarter of its time (0.46 instead of 0.35 s for 64 tokens of
    8 completions behind 591 of prompt, with the model of bench/vs_trl.py on two CPU cores). `attend` puts the two parts
    together. Without gradients only: tokens are written into memory that earlier steps still look at.
    """

    ROOM = 64  # tokens for which memory is taken at a time

    @classmethod
    def take_over(cls, layer: DynamicLayer) -> None:
        """Make a plain layer that holds B prompts one of these, with one completion, still empty, of each."""
        layer.__class__ = cls
        layer.prompts = (
            layer.keys.float(),
            layer.values.float(),
        )  # [B, heads, P, D]; in float32 once, not at every token
        layer.prompt = torch.arange(len(layer.keys), device=layer.keys.device)  # [N], of which prompt a completion is
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        layer.reorder_cache(layer.prompt)

    def reorder_cache(self, rows: Tensor) -> None:
        """The completions `rows` in place of those before."""
        done = self.keys.shape[-2]
        self.prompt = self.prompt[rows]
        self.memory = tuple(F.pad(x[rows, :, :done], (0, 0, 0, self.ROOM)) for x in (self.keys, self.values))
        self.keys, self.values = (x[:, :, :done] for x in self.memory)
        # Where each completion stands among those of its prompt: prompts may have unequally many left.
        before = (self.prompt[:, None] == self.prompt).tril(-1)
        self.place = before.sum(1)
        self.most = int(self.place.max()) + 1
        whole = torch.arange(len(self.prompts[0]), device=rows.device).repeat_interleave(self.most)
        self.even = torch.equal(self.prompt, whole)  # until rows leave, a change of shape does it

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        old, new = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if new > self.memory[0].shape[-2]:
            self.memory = tuple(F.pad(x, (0, 0, 0, new - old + self.ROOM)) for x in self.memory)
        for x, states in zip(self.memory, (key_states, value_states)):
            x[:, :, old:new] = states
        self.keys, self.values = (x[:, :, :new] for x in self.memory)
        # For `attend`, which is given nothing but these tensors; weakly, or the cycle would keep caches in memory.
        self.keys.layer = weakref.proxy(self)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.prompts[0].shape[-2] + self.keys.shape[-2]

    def per_prompt(self, x: Tensor) -> Tensor:
        """[N, heads, r, n] -> [B, heads, G * r, n]: rows of a prompt side by side, zeros where it has fewer than others."""
        if self.even:
            slots = x.unflatten(0, (-1, self.most))
        else:
            slots = x.new_zeros(len(self.prompts[0]), self.most, *x.shape[1:])
            slots[self.prompt, self.place] = x
        return slots.transpose(1, 2).flatten(2, 3)

    def per_row(self, x: Tensor) -> Tensor:
        """The inverse of per_prompt."""
        slots = x.unflatten(2, (self.most, -1)).transpose(1, 2)
        return slots.flatten(0, 1) if self.even else slots[self.prompt, self.place]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one new token of each completion to its prompt and to its own tokens, with transformers' signature.

    query [N, H, 1, D]; key, value [N, heads, t, D], of a CommonPromptLayer; attention_mask [N, 1, 1, P + t], bool. In float32, as
    fused kernels keep their scores too: rounded to bf16 they would make the sampler another policy than the scorer.
    """
    layer, (keys, values) = key.layer, key.layer.prompts
    (heads, P, D), N = keys.shape[1:], len(query)
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().view(N, heads, -1, D)  # [N, heads, H / heads, D]: the queries that share a key
        own = grouped @ key.float().mT
        scores = torch.cat([layer.per_row(layer.per_prompt(grouped) @ keys.mT), own], -1) * scaling
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        weights = scores.softmax(-1)
        out = layer.per_row(layer.per_prompt(weights[..., :P]) @ values) + weights[..., P:] @ value.float()
    return out.reshape(N, 1, -1, D).to(query.dtype), None


AttentionInterface.register("common_prompt", attend)
AttentionMaskInterface.register("common_prompt", sdpa_mask)


@contextlib.contextmanager
def attention_by(model: nn.Module, implementation: str) -> Iterator[None]:
    """Let the language model attend by another of transformers' implementations for a while."""
    config = language_model(model).config
    usual = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = usual


@contextlib.contextmanager
def prompts_in_common(model: nn.Module, cache: Any, crosses: bool) -> Iterator[None]:
    """While tokens are sampled, let completions read the keys and values of their prompts in `cache` from one place.

    Where the language model attends in a way of its own, `crosses` to images, or has layers that slide or hold a state, all
    stays as it is: copies.
    """
    text = language_model(model)
    fused = text.config._attn_implementation.startswith(("sdpa", "flash_attention"))
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    if crosses or not fused or not plain or not text._supports_attention_backend:
        yield
        return
    for layer in cache.layers:
        CommonPromptLayer.take_over(layer)
    with attention_by(model, "common_prompt"):
        yield


# ------------------------------------------------------------------------------------------------
# Loading.


@contextlib.contextmanager
def loading(what: str, name: str):
    """Turn what cannot be loaded into a message that says what to do; a hub that cannot be reached gets three lines."""
    try:
        yield
    except ImportError as error:
        says = (r"pip install ([\w-]+)", r"requires the (\w+) library", r"No module named '(\w+)'")
        package = next((found[1].lower() for pattern in says if (found := re.search(pattern, str(error)))), None)
        remedy = f"pip install {package}" if package else " ".join(str(error).split())
        raise SystemExit(f"{what} {name} needs a package that is not installed: {remedy}") from None
    except DataError:  # says already what to do
        raise
    except (
        OSError,
        ValueError,
    ) as error:  # every error of a hub is an OSError; a folder that is no model, a ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(name).exists():
            raise SystemExit(f"{what} {name} cannot be loaded: {reason}") from None
        raise SystemExit(
            f"{what} {name} is not a folder here and cannot be had from the hub: {reason}\n"
            "With COCO and a model on disk:  accelerate launch virft.py --task coco --data COCO_DIR --model MODEL_DIR\n"
            "Offline, with what is in here:  bash run.sh"
        ) from None


def load_processor(
    name: str, revision: str | None, max_pixels: int, min_pixels: int, coordinates: str = "auto"
) -> tuple[Any, data.Fit, str]:
    """A model's processor, how it wants its images, and the coordinates that it speaks ("auto": those of its family)."""
    with loading("model", name):
        family = AutoConfig.from_pretrained(name, revision=revision).model_type
        processor = AutoProcessor.from_pretrained(name, revision=revision)
    if getattr(processor, "chat_template", None) is None:
        raise SystemExit(f"model {name} has no chat template; an instruction-tuned vision-language model is expected")
    fit = data.image_fit(processor.image_processor, max_pixels, min_pixels)
    data.check_fit(processor.image_processor, fit)
    if coordinates != "auto":
        return processor, fit, coordinates
    if family not in data.COORDINATES_OF_FAMILY:
        print(
            f"model type {family} is not known here: coordinates taken as 0..1000, relative; see --coordinates",
            file=sys.stderr,
        )
    return processor, fit, data.COORDINATES_OF_FAMILY.get(family, "relative")


def max_positions(name: str, revision: str | None) -> int:
    """How many tokens a model's positions are made for; sys.maxsize where its configuration does not say."""
    text = AutoConfig.from_pretrained(name, revision=revision).get_text_config()
    return getattr(text, "max_position_embeddings", None) or sys.maxsize


def frozen_dtype(device: torch.device) -> torch.dtype:
    """Of weights that nothing trains: bf16 on GPUs; what is trained is float32, or it would lose updates of 1e-6."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(name: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model in eval mode, which it never leaves: dropout would make sampler and scorer two policies."""
    with loading("model", name):
        architectures = AutoConfig.from_pretrained(name, revision=revision).architectures or [""]
        able = getattr(getattr(transformers, architectures[0], None), "_supports_flash_attn", False)  # Mllama is not
        flash = able and device.type == "cuda" and is_flash_attn_2_available()
        attention = "flash_attention_2" if flash else "sdpa"
        model = AutoModelForImageTextToText.from_pretrained(
            name, revision=revision, dtype=dtype, attn_implementation=attention
        )
    return model.to(device).eval()


def special_tokens(model: nn.Module, processor) -> tuple[list[int], list[int]]:
    """Ids that end a completion (all EOS ids of the model) and ids that no completion may contain (placeholders)."""
    text, tokenizer = model.config.get_text_config(), processor.tokenizer
    configured = (model.generation_config.eos_token_id, text.eos_token_id, tokenizer.eos_token_id)
    eos = {token for ids in configured if ids is not None for token in (ids if isinstance(ids, list) else [ids])}
    kinds = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    forbidden = {token for kind in kinds if isinstance(token := getattr(model.config, kind, None), int)}
    predicted = range(model.get_output_embeddings().weight.shape[0])  # some placeholders have an embedding but no logit
    return sorted(eos), sorted(forbidden.intersection(predicted) - eos)


# ------------------------------------------------------------------------------------------------
# What is trained, and where it lies.


def language_model(model: nn.Module) -> nn.Module:
    """The part that reads tokens: the module that holds the token embedding."""
    embedding = model.get_input_embeddings()
    return next(module for module in model.modules() if embedding in module.children())


def freeze_vision(model: nn.Module) -> None:
    """Freeze all that neither reads nor writes tokens: vision tower and projector."""
    kept = {id(p) for part in (language_model(model), model.get_output_embeddings()) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def add_adapters(model: nn.Module, rank: int, saved: Path | None):
    """Put LoRA adapters (arXiv 2106.09685) on every linear layer of the language model; peft's handle on them.

    saved: folder of adapters to go on with. Everything else is frozen; an adapter starts as no change at all.
    """
    with loading("--lora_rank", str(rank)):
        import peft
    if saved:
        return peft.PeftModel.from_pretrained(model, saved, is_trainable=True)
    inside = set(language_model(model).modules())
    layers = [name for name, module in model.named_modules() if module in inside and isinstance(module, nn.Linear)]
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))


def unreachable(model: nn.Module, output: Tensor) -> dict[str, nn.Parameter]:
    """Trainable parameters that have no path to the output: its graph is walked, nothing is computed backward."""
    nodes, seen, reached = [output.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            nodes += [parent for parent, _ in node.next_functions]
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached}


def shard(model: nn.Module) -> None:
    """Share the weights out over the processes, block by block (FSDP2): a block is gathered when it is needed.

    Called here and not by accelerate, whose FSDP2 becomes DDP without a word where there is no GPU to test it on.
    """
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block)
    fully_shard(model)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is shared out over the processes, gathered on each of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU where there is one, otherwise of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # the one unit that differs between systems


# ------------------------------------------------------------------------------------------------
# Saving, whole or not at all.


def write_model(model: nn.Module, processor, folder: Path, dtype: torch.dtype, main: bool) -> None:
    """Model and processor in Hugging Face format. Every process calls it, the main one writes."""
    weights, written = {}, {}
    for name, tensor in model.state_dict().items():
        place = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()
        tensor = whole_tensor(tensor)  # one at a time: only the main process ever holds them all
        if main:
            copied = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            weights[name] = written.setdefault(place, copied)  # tied weights stay one tensor, and are saved once
    if main:
        model.save_pretrained(folder, state_dict=weights)
        config = AutoConfig.from_pretrained(folder)
        config.dtype = dtype  # save_pretrained writes down the dtype of training
        config.save_pretrained(folder)
        processor.save_pretrained(folder)


def save_model(model: nn.Module, processor, folder: Path, dtype: torch.dtype, main: bool) -> None:
    """write_model, whole or not at all: an earlier folder of this name stays until the new one is complete."""
    new, old = (folder.with_name(f"{folder.name}.{state}") for state in ("unfinished", "old"))
    if main:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():  # killed between the two renames below
            old.rename(folder)
    write_model(model, processor, new, dtype, main)
    if main:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# Checkpoints: all that the next step depends on, and that is weights, moments of the optimizer and the number of the
# step. Learning rate, order of examples and sampling noise are functions of step and seed, so there is no state of a
# scheduler, a loader or a random number generator to be saved.
#
#   OUT/checkpoints/step_000050/model/                   float32, an ordinary model folder (with adapters: those alone)
#                              /optimizer.safetensors    KEY/NAME OF PARAMETER
#                              /state.json               step, settings, fingerprint of the data, sizes of all files


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, as find_checkpoint found it."""

    folder: Path
    step: int
    settings: dict[str, Any]
    data: str  # fingerprint

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give every trained parameter its moments back; of shards each process takes its part."""
        tensors = load_file(self.folder / "optimizer.safetensors")
        names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for key_and_name, value in tensors.items():
            key, _, name = key_and_name.partition("/")
            parameter, value = names[name], value.to(names[name].device)
            if isinstance(parameter, DTensor) and value.dim():
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][key] = value


def fingerprint(rows: Iterable) -> str:
    """Changes with the rows, their order or anything that their repr shows."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for count, row in enumerate(rows, 1):
        digest.update(repr(row).encode())
    return f"{count} examples, {digest.hexdigest()}"


def checkpoint_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step_{step:06d}"


def checkpoint_folders(out: Path) -> list[Path]:
    """Those that were finished, oldest first; a folder gets its name by renaming, once everything is in it."""
    return sorted(f for f in (out / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", f.name))


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, processor, adapters, folder: Path, state: dict, keep_last: int, main: bool
) -> None:  # fmt: skip
    """Write aside, then rename; only then the oldest goes. Every process calls it, the main one writes.

    folder: checkpoint_folder(...); state: step, settings and data of a Checkpoint. SystemExit, naming the last good
    checkpoint, where it cannot be written (a full disk).
    """
    out, new = folder.parents[1], folder.with_suffix(".unfinished")
    try:
        if main:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        if not adapters:
            write_model(model, processor, new / "model", torch.float32, main)
        elif main:
            adapters.save_pretrained(new / "model")
        moments = {}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                value = whole_tensor(value)
                if main:
                    moments[f"{key}/{name}"] = value.to("cpu")
        if main:
            save_file(moments, new / "optimizer.safetensors")
            files = {str(f.relative_to(new)): f.stat().st_size for f in sorted(new.rglob("*")) if f.is_file()}
            (new / "state.json").write_text(json.dumps(state | {"files": files}, indent=2) + "\n")
            for name in (*files, "state.json"):
                with open(new / name, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)  # of this step, from before it was resumed
            new.rename(folder)
            for old in checkpoint_folders(out)[:-keep_last]:
                shutil.rmtree(old.rename(old.with_suffix(".unfinished")))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        good = checkpoint_folders(out)
        offer = f"The last good one is {good[-1]}: make room, then --resume true" if good else "There is none before it"
        raise SystemExit(f"checkpoint {folder} cannot be written: {error}. {offer}") from None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Raises ValueError, saying what, where something is missing, cut off or not ours."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        checkpoint = Checkpoint(folder, int(state["step"]), dict(state["settings"]), str(state["data"]))
        sizes = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} is not one that was written here ({error!r})") from None
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else "no"
        if found != size:
            raise ValueError(f"{folder / name} has {found} bytes, {size} were written")
    return checkpoint


def find_checkpoint(
    out: Path, settings: dict[str, Any], defaults: dict[str, Any], may_change: Sequence[str]
) -> Checkpoint:
    """The newest checkpoint of a run. SystemExit where it is damaged, foreign or was made with other settings.

    defaults: of settings that a checkpoint of an earlier version does not hold; may_change: names that need not agree.
    """
    folders, whole, flaws = checkpoint_folders(out), [], {}
    for folder in folders:
        try:
            whole.append(read_checkpoint(folder))
        except ValueError as error:
            flaws[folder] = error
    if not folders:
        raise SystemExit(f"--resume true: {out / 'checkpoints'} holds no checkpoint; see --save_every")
    if folders[-1] in flaws:
        offer = f"Move that folder away to go on from {whole[-1].folder}" if whole else "There is no other"
        raise SystemExit(f"--resume true: {flaws[folders[-1]]}. {offer}")
    before = defaults | whole[-1].settings
    if changed := [name for name in settings if name not in may_change and settings[name] != before[name]]:
        right = " ".join(f"--{name} {before[name]}" for name in changed)
        raise SystemExit(f"--resume true: {whole[-1].folder} was made with {right}, and a run keeps its settings")
    return whole[-1]
