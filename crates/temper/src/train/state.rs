//! The state of a run in a checkpoint: the model, the optimizer's moments, the counters.

use std::path::Path;

use serde_json::{Value, json};
use temper_kernels::Device;

use super::directory::{Directory, checkpoint_folder, write_done};
use super::{Error, Run, Trainer};
use crate::checkpoint;
use crate::checkpoint::save::{SaveType, SavedTensor, create_folder, write_json, write_safetensors};
use crate::model::files;
use crate::model::spec::Spec;
use crate::model::weights::Weights;
use crate::optim::Moments;
use crate::parallel::{Ranks, Strategy};

/// Writes a checkpoint, whole; ranks that have no directory send their pieces.
pub(super) fn save<D: Device>(
    device: &D,
    trainer: &Trainer<'_, D>,
    run: &Run<'_>,
    directory: Option<&Directory>,
) -> crate::Result<()> {
    let Moments { first, second } = &trainer.moments;
    let moments = [(first, "first."), (second, "second.")];
    let moments =
        moments.map(|(moments, prefix)| saved_moments(device, trainer, &run.ranks, moments, prefix));
    let moments = moments.into_iter().flatten().collect::<Vec<_>>();
    let Some(directory) = directory else {
        send(run.start.pieces(device, &trainer.decoder));
        if run.ranks.strategy != Strategy::Ddp {
            send(moments);
        }
        return Ok(());
    };
    create_folder(&checkpoint_folder(run.out, trainer.steps_done), |folder| -> crate::Result<()> {
        run.start.write(device, &trainer.decoder, run.processor, folder, SaveType::F32)?;
        write_safetensors(&folder.join("moments.safetensors"), &moments, SaveType::F32)?;
        let state = json!({ "step": trainer.steps_done, "num_tokens": trainer.num_tokens });
        write_json(&folder.join("state.json"), &state)?;
        write_done(folder)
    })?;
    directory.remove_old(run.keep)?;
    Ok(())
}

/// Asks for tensors that the first rank writes, in its order.
pub(super) fn send(tensors: Vec<SavedTensor<'_>>) {
    tensors.iter().for_each(|tensor| (tensor.values)().for_each(drop));
}

fn saved_moments<'a, D: Device>(
    device: &'a D,
    trainer: &'a Trainer<'_, D>,
    ranks: &'a Ranks,
    moments: &'a Weights<Option<D::Buffer>>,
    prefix: &str,
) -> Vec<SavedTensor<'a>> {
    let all = trainer.decoder.specs.iter().zip(moments.iter());
    let of_one = |(spec, moment): (&'a Spec, &'a Option<D::Buffer>)| {
        let moment = moment.as_ref()?;
        Some(files::saved(spec, prefix, move |range| match ranks.strategy {
            Strategy::Ddp => files::elements(device.download(moment), range),
            Strategy::Zero1 | Strategy::Fsdp => {
                ranks.on_first(&device.download(moment), spec.len(), range).into()
            }
        }))
    };
    all.filter_map(of_one).flatten().collect()
}

/// Moments and counters of a checkpoint.
pub(super) fn load<D: Device>(
    device: &D,
    trainer: &mut Trainer<'_, D>,
    ranks: &Ranks,
    out: &Path,
    folder: &Path,
) -> crate::Result<()> {
    let damaged = |message: String| damaged(folder, message);
    let state = std::fs::read(folder.join("state.json"))
        .map_err(|error| damaged(format!("cannot read state.json: {error}")))?;
    let state: Value =
        serde_json::from_slice(&state).map_err(|error| damaged(format!("state.json is damaged: {error}")))?;
    let number = |key: &str| state[key].as_u64().ok_or_else(|| damaged(format!("state.json has no `{key}`")));
    (trainer.steps_done, trainer.num_tokens) = (number("step")?, number("num_tokens")?);
    if folder != checkpoint_folder(out, trainer.steps_done) {
        return Err(damaged(format!("state.json is of step {}", trainer.steps_done)).into());
    }
    let moments = checkpoint::open_file(&folder.join("moments.safetensors"))
        .map_err(|error| damaged(error.to_string()))?;
    let Moments { first, second } = &mut trainer.moments;
    for (prefix, all) in [("first.", first), ("second.", second)] {
        for (spec, buffer) in trainer.decoder.specs.iter().zip(all.iter_mut()) {
            let Some(buffer) = buffer else { continue };
            let own = ranks.updated(spec.len());
            files::read(&moments, prefix, spec, |at, values| {
                files::set_own(device, buffer, &own, at, values);
            })
            .map_err(|error| damaged(error.to_string()))?;
        }
    }
    Ok(())
}

/// The error of a checkpoint that cannot be gone on from.
pub(super) fn damaged(folder: &Path, message: String) -> Error {
    Error::run(folder, message, Some("remove this checkpoint to go on from the one before"))
}
