//! What the attention of each layer sees, from `config.json`.

use serde_json::Value;

use super::Error;
use super::config::Family::{self, Gemma3, Llama, Mistral, Qwen2, Qwen3, SmolLm3};
use super::keys::Keys;
use super::rotary::Rotary;

/// What a layer's attention sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layer {
    /// A token sees at most this many tokens, itself included.
    pub window: Option<usize>,
    /// How q and k are turned by their positions, if they are.
    pub rotary: Option<Rotary>,
}

/// What Transformers calls a layer without a window, and one with it.
const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];

impl Layer {
    /// As `layer_types` says it.
    pub(super) fn kind(&self) -> &'static str {
        KINDS[usize::from(self.window.is_some())]
    }
}

/// How many there are. A layer has names before it has values: a small file must not ask for gigabytes of them.
pub(super) fn count(keys: &Keys, key: &str) -> Result<usize, Error> {
    /// More than any model has.
    const MOST: usize = 4096;
    let count = keys.required_size(key)?;
    if count > MOST { Err(keys.wrong(key, format!("at most {MOST} layers"))) } else { Ok(count) }
}

/// The layers of Llama and its kin.
pub(super) fn read(keys: &Keys, family: Family) -> Result<Vec<Layer>, Error> {
    let count = count(keys, "num_hidden_layers")?;
    let [full, sliding] = match family {
        Gemma3 => Rotary::read_pair(keys)?,
        SmolLm3 => [Rotary::read(keys, 2_000_000.0)?; 2],
        _ => [Rotary::read(keys, 10_000.0)?; 2],
    };
    let turned = if family == SmolLm3 { turned(keys, count)? } else { vec![true; count] };
    let window = window(keys, family)?;
    let slides = slides(keys, family, window.is_some(), &turned)?;
    let layer = |(slides, turned): (bool, bool)| Layer {
        window: window.filter(|_| slides),
        rotary: turned.then_some(if slides { sliding } else { full }),
    };
    Ok(slides.into_iter().zip(turned).map(layer).collect())
}

/// SmolLM3's layers with positions: those with a 1 in `no_rope_layers`, or all but every so many.
fn turned(keys: &Keys, count: usize) -> Result<Vec<bool>, Error> {
    let interval = keys.size("no_rope_layer_interval")?.unwrap_or(4);
    let Some(listed) = keys.value("no_rope_layers") else {
        return Ok((1..=count).map(|layer| !layer.is_multiple_of(interval)).collect());
    };
    let known = |flag: &Value| flag.as_u64().filter(|flag| *flag <= 1).map(|flag| flag == 1);
    // Transformers takes a longer list, too.
    let listed = listed.as_array().filter(|listed| listed.len() >= count);
    let turned: Option<Vec<bool>> = listed.and_then(|listed| listed[..count].iter().map(known).collect());
    turned.ok_or_else(|| keys.wrong("no_rope_layers", format!("0 or 1 for each of {count} layers")))
}

/// The window of the layers that have one.
fn window(keys: &Keys, family: Family) -> Result<Option<usize>, Error> {
    let given = keys.size("sliding_window")?;
    let default = if keys.has("sliding_window") { None } else { Some(4096) };
    match family {
        Llama if given.is_some() => Err(keys.wrong("sliding_window", "`null`")),
        Mistral | Gemma3 => Ok(given.or(default)),
        // These write a window whether they use it or not.
        Qwen2 | Qwen3 if keys.boolean("use_sliding_window", false)? => Ok(given.or(default)),
        SmolLm3 if keys.boolean("use_sliding_window", false)? => Ok(given),
        _ => Ok(None),
    }
}

/// Which layers have the window, if there is one.
fn slides(keys: &Keys, family: Family, windowed: bool, turned: &[bool]) -> Result<Vec<bool>, Error> {
    let count = turned.len();
    let usual: Vec<bool> = match family {
        Qwen2 | Qwen3 => {
            let full = keys.value("max_window_layers").map_or(Some(28), Value::as_u64);
            let full = full.ok_or_else(|| keys.wrong("max_window_layers", "an integer of at least 0"))?;
            (0..count as u64).map(|layer| layer >= full).collect()
        }
        SmolLm3 => {
            // Written, and of no effect.
            keys.value("max_window_layers");
            turned.iter().map(|turned| !turned).collect()
        }
        Gemma3 => {
            // Transformers' own note of the other.
            keys.value("_sliding_window_pattern");
            let pattern = keys.size("sliding_window_pattern")?.unwrap_or(6);
            (1..=count).map(|layer| !layer.is_multiple_of(pattern)).collect()
        }
        _ => vec![true; count],
    };
    let [full, sliding] = KINDS;
    let slides = match keys.value("layer_types") {
        // Gemma's layers slide whether there is a window or not.
        None if family == Gemma3 => usual,
        None => usual.into_iter().map(|slides| slides && windowed).collect(),
        Some(types) => listed(types, count).ok_or_else(|| {
            keys.wrong("layer_types", format!("`{full}` or `{sliding}` for each of {count} layers"))
        })?,
    };
    if !windowed && slides.contains(&true) {
        return Err(match family {
            Gemma3 => keys.wrong("sliding_window", "a number of tokens, as some layers have a window"),
            Qwen2 | Qwen3 | SmolLm3 => {
                keys.wrong("layer_types", format!("`{full}`, as `use_sliding_window` gives no window"))
            }
            _ => keys.wrong("layer_types", format!("`{full}`, as there is no window")),
        });
    }
    // Mistral's window holds whatever `layer_types` says.
    if family == Mistral && windowed && slides.contains(&false) {
        return Err(keys.wrong("layer_types", format!("`{sliding}`, as there is a window")));
    }
    Ok(slides)
}

/// Which of `count` layers `layer_types` says have a window.
fn listed(types: &Value, count: usize) -> Option<Vec<bool>> {
    let slides = |kind: &Value| Some(KINDS.iter().position(|known| kind == known)? == 1);
    types.as_array().filter(|types| types.len() == count)?.iter().map(slides).collect()
}
