"""What vLLM's Python runs: log-probabilities of a prompt under a base and under adapters, one after the other.

Standard input has a JSON list: the folder of the base, the tokens of the prompt, and the folders of the adapters. The
last line of standard output is a JSON object: folder → the log-probability of each token but the first, or an error.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    base, prompt, *folders = json.load(sys.stdin)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    llm = LLM(
        base, skip_tokenizer_init=True, enable_lora=True, max_lora_rank=16, enforce_eager=True, dtype="float32",
        max_model_len=64, max_num_seqs=2,
    )  # fmt: skip
    found = {}
    for number, folder in enumerate(["", *folders]):
        adapter = LoRARequest(f"adapter{number}", number, folder) if number else None
        try:
            # An adapter that is refused while a prompt waits would let the engine wait for ever.
            if adapter:
                llm.llm_engine.add_lora(adapter)
        except (RuntimeError, ValueError) as error:
            found[folder] = str(error)
            continue
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=prompt), sampling, lora_request=adapter, use_tqdm=False)
        steps = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        found[folder] = [step[token].logprob for token, step in steps]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
