"""Many texts to audio files in Parquet, on a Ray cluster: `job.run_batch`. It needs the extra `ray`."""
