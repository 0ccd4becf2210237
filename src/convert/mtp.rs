//! The MTP layer's inputs over the calibration (SPEC.md section 3).

use std::path::Path;

use super::attention::{norm, tensor};
use super::forward::{Stream, embeddings};
use super::hidden::Hidden;
use super::linalg::product;
use crate::error::Result;

/// From the states after the model's last layer to the MTP layer's input: `eh_proj([enorm(embed(t+1)) ; hnorm(h_t)])`,
/// a token fewer a window.
pub fn enter<'a>(main: Stream<'a>, bound: u64, directory: &Path) -> Result<Stream<'a>> {
    let (config, checkpoint) = (main.config, main.checkpoint);
    let (hidden, eps) = (config.hidden, config.norm_eps);
    let at = |name: &str| format!("model.layers.{}.{name}", config.layers);
    let vector = |name: &str| checkpoint.vector(&at(name), hidden);
    let (enorm, hnorm) = (vector("enorm.weight")?, vector("hnorm.weight")?);
    let last = checkpoint.vector("model.norm.weight", hidden)?;
    let joined = tensor(checkpoint, &at("eh_proj.weight"), hidden, 2 * hidden)?;
    let length = main.length() - 1;
    let states = Hidden::new(main.windows.len(), length * hidden, bound, directory)?;
    for (i, tokens) in main.windows.iter().enumerate() {
        let mut next = embeddings(checkpoint, config, &tokens[1..])?;
        norm(&mut next, &enorm, eps);
        let mut h = main.final_state(i, &last)?;
        h.truncate(length * hidden);
        norm(&mut h, &hnorm, eps);
        let rows: Vec<f32> =
            next.chunks_exact(hidden).zip(h.chunks_exact(hidden)).flat_map(|(e, h)| [e, h].concat()).collect();
        states.write(i, &product(&rows, 2 * hidden, &joined))?;
    }
    let windows = main.windows.iter().map(|w| &w[..length]).collect();
    Ok(Stream { checkpoint, config, windows, hidden: states })
}
