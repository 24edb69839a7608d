//! The quickstart, short.

use crate::support::{Place, contents, fixture};

#[test]
fn its_page_shows_every_stage_and_its_models_answer() {
    let place = Place::new();
    let ran = place.run("quickstart --smoke --out q", &[]).good();
    assert!(ran.stdout().contains("a record, [trained]"), "{}", ran.stdout());
    let page = std::fs::read_to_string(place.path("q/report.html")).unwrap();
    for part in
        ["pretrained", "sft", "dpo", "control", "<svg", "my name is Kate", "temper chat --model q/dpo"]
    {
        assert!(page.contains(part), "`{part}` is not on the page");
    }
    for stage in ["pretrained", "sft", "dpo"] {
        place.run(&format!("generate --model q/{stage} --max-new-tokens 4 --prompt Human:"), &[]).good();
    }
    place.run("inspect --model q/sft --data q/data/preferences.jsonl", &[]).good();
    place.run("quickstart --smoke --out q", &[]).failed(1, &["is not empty", "hint"]);
}

#[test]
fn it_is_the_same_with_another_number_of_threads() {
    let place = Place::new();
    for threads in ["1", "2"] {
        place.run(&format!("quickstart --smoke --seed 5 --threads {threads} --out {threads}"), &[]).good();
    }
    let models =
        |threads| contents(&place.path(&format!("{threads}/dpo"))).into_iter().map(|(_, bytes)| bytes);
    assert!(models(1).eq(models(2)));
}

#[test]
fn on_a_model_of_the_user_it_fine_tunes_and_prefers() {
    let place = Place::new();
    let model = fixture("chat-tiny");
    place.run("quickstart --smoke --out q --model", &[&model]).good();
    let page = std::fs::read_to_string(place.path("q/report.html")).unwrap();
    for part in ["before", "sft", "dpo", "Who are you?", "preference accuracy"] {
        assert!(page.contains(part), "`{part}` is not on the page");
    }
    place.run("generate --model q/dpo --max-new-tokens 4 --chat --prompt Hello", &[]).good();
    let settings =
        |folder: &std::path::Path| std::fs::read_to_string(folder.join("generation_config.json")).unwrap();
    let [kept, given] = [settings(&place.path("q/dpo")), settings(model.as_ref())];
    let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(parse(&kept), parse(&given));
    let no_template = fixture("gpt2-tiny");
    place.run("quickstart --smoke --out p --model", &[&no_template]).failed(1, &["hint"]);
}

#[test]
fn a_model_too_short_for_it_is_refused_before_anything_is_written() {
    let place = Place::new();
    std::fs::create_dir(place.path("short")).unwrap();
    for (path, bytes) in contents(fixture("chat-tiny").as_ref()) {
        let text = String::from_utf8_lossy(&bytes);
        let name = path.file_name().unwrap();
        let target = place.path("short").join(name);
        match name == "config.json" {
            true => std::fs::write(
                target,
                text.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 32"),
            ),
            false => std::fs::write(target, bytes),
        }
        .unwrap();
    }
    place
        .run("quickstart --smoke --out q --model short", &[])
        .failed(1, &["context of `short` is 32", "hint"]);
    assert!(!place.path("q").exists());
    place.file("q", "a file");
    place.run("quickstart --smoke --out q", &[]).failed(1, &["cannot create `q/data`", "hint"]);
}
