//! Which group, head, column or row a rank owns: pure arithmetic.
//!
//! Both paths shard query heads; the GQA path gives a rank whole groups. Widths are split as evenly as they go.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::config::{Attention, ModelConfig};
use crate::error::{Error, Result};

/// The decoding path: what the cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// Keys and values of the rank's groups, and the rope key once.
    Gqa,
    /// The latent and the rope key, on every rank.
    Absorb,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Path::Gqa => "gqa",
            Path::Absorb => "absorb",
        })
    }
}

impl FromStr for Path {
    type Err = Error;
    fn from_str(s: &str) -> Result<Path> {
        match s {
            "gqa" => Ok(Path::Gqa),
            "absorb" => Ok(Path::Absorb),
            other => Err(Error::Usage(format!("path {other:?} is unknown: use gqa or absorb"))),
        }
    }
}

/// One rank of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// This rank, `0..world`.
    pub rank: usize,
    /// World size W.
    pub world: usize,
}

/// What a rank owns of one model on one path.
#[derive(Debug, Clone, PartialEq)]
pub struct Owned {
    /// Its place in the world.
    pub shard: Shard,
    /// The path.
    pub path: Path,
    /// Its query heads.
    pub heads: Range<usize>,
    /// The groups those heads belong to. On the GQA path no other rank has them.
    pub groups: Range<usize>,
    /// Its rows of the embedding and the head.
    pub vocab: Range<usize>,
}

impl Shard {
    /// A world of one.
    pub const ONE: Shard = Shard { rank: 0, world: 1 };

    /// This rank's part of `0..total`: contiguous, disjoint over ranks, covering, sizes differing by at most one.
    pub fn range(&self, total: usize) -> Range<usize> {
        total * self.rank / self.world..total * (self.rank + 1) / self.world
    }

    /// What this rank owns of `model` on `path`; refused unless W divides the groups (GQA) or the heads (absorb).
    pub fn owned(&self, model: &ModelConfig, path: Path) -> Result<Owned> {
        check(model, path, self.world)?;
        let heads = self.range(model.heads());
        let per_group = model.heads() / model.groups();
        let groups = heads.start / per_group..(heads.end - 1) / per_group + 1;
        Ok(Owned { shard: *self, path, heads, groups, vocab: self.range(model.vocab) })
    }
}

/// The world sizes that `path` can run `model` at, ascending.
pub fn world_sizes(model: &ModelConfig, path: Path) -> Vec<usize> {
    let n = match (path, &model.attention) {
        (Path::Absorb, Attention::Grouped(_)) => return vec![],
        (Path::Gqa, _) => model.groups(),
        (Path::Absorb, _) => model.heads(),
    };
    (1..=n).filter(|w| n % w == 0).collect()
}

/// Refuses a world size that does not fit, naming those that do and the path that would take this one.
pub fn check(model: &ModelConfig, path: Path, world: usize) -> Result<()> {
    let fits = world_sizes(model, path);
    if fits.contains(&world) {
        return Ok(());
    }
    if fits.is_empty() {
        return Err(Error::Sharding(format!(
            "{} has no latent to cache, so it has no absorb path: use --path gqa, or convert it with gqla convert",
            model.architecture
        )));
    }
    let (what, count, other) = match path {
        Path::Gqa => ("groups", model.groups(), Path::Absorb),
        Path::Absorb => ("query heads", model.heads(), Path::Gqa),
    };
    let sizes = fits.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let remedy = if world_sizes(model, other).contains(&world) {
        format!("; --path {other} would take {world} ranks")
    } else {
        String::new()
    };
    Err(Error::Sharding(format!(
        "{world} ranks do not divide the model's {count} {what} ({path} path): world sizes that work are {sizes}{remedy}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_partition_any_total() {
        for total in 0..70 {
            for world in 1..10 {
                let mut next = 0;
                for rank in 0..world {
                    let r = Shard { rank, world }.range(total);
                    assert_eq!(r.start, next);
                    assert!(r.len() >= total / world && r.len() <= total.div_ceil(world));
                    next = r.end;
                }
                assert_eq!(next, total);
            }
        }
    }
}
