#!/usr/bin/env python3
"""Makes every golden file of this folder from nothing with Transformers and PEFT in fp32.

Made with Python 3.11, torch 2.15.0 (CPU), transformers 5.23.0, peft 0.21.2, tokenizers 0.23.3,
safetensors 0.8.0, gguf 0.19.0, numpy 2.4.6. All seeds are in the scripts; a rerun with these
versions gives the same bytes, on another CPU the same numbers up to rounding.

    make_goldens.py tiny embeddings gguf real     (any of them; `real` needs the demo model and its
                                                   adapters, `embeddings` what `tiny` makes)

tiny: models/, adapters/, logits/ and cases.json. embeddings: embeddings.json. gguf: *.gguf under
models/, gguf/ and gguf_cases.json. real: real.json.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"


def main(parts):
    for part in parts or ["tiny", "embeddings", "gguf", "real"]:
        if part not in ("tiny", "embeddings", "gguf", "real"):
            sys.exit(f"make_goldens.py: no part '{part}' (tiny, embeddings, gguf, real)")
        __import__(f"golden_{part}").main()


if __name__ == "__main__":
    main(sys.argv[1:])
