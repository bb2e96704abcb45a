"""The speech service as a Space on the Hub: `python app.py`, then http://localhost:7860."""

import os

from transformers_sled.server import ServiceSettings, run_service


if __name__ == "__main__":
    keys = tuple(key for key in [os.environ.get("SLED_API_KEY")] if key)
    settings = ServiceSettings(api_keys=keys, max_streams=4, max_queue=16, max_input_characters=1000, cloning=False)
    run_service(settings, host="0.0.0.0", port=int(os.environ.get("PORT", "7860")))
