//! Checkpoints that are as they should be: the committed models, what is saved is what is read, and the
//! number formats of GGUF.

use std::path::PathBuf;

use temper::checkpoint;
use temper::model::Config;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures")).join(name)
}

#[test]
fn every_committed_model_opens() {
    for name in [
        "gpt2-tiny",
        "gpt2-hub",
        "llama-tiny",
        "llama3-tiny",
        "llama-linear",
        "mistral-tiny",
        "qwen2-tiny",
        "qwen3-tiny",
        "bf16-tiny",
        "f16-tiny",
    ] {
        let checkpoint = checkpoint::open(&fixture(name)).unwrap();
        let config = Config::from_json(&checkpoint.config).unwrap();
        assert_eq!(config.vocabulary, 96, "{name}");
        assert_eq!(Config::from_json(&config.to_json(&checkpoint.config)).unwrap(), config, "{name}");
        for (tensor, shape) in checkpoint.tensors() {
            assert_eq!(checkpoint.read(tensor).unwrap().len(), shape.iter().product::<usize>());
        }
    }
}
