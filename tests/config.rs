//! Configurations as checkpoints write them: every spelling is read, everything else is refused by name.

use std::path::{Path, PathBuf};

use gqla::config::{Attention, Mlp, ModelConfig, RopeScaling, Scoring};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

#[test]
fn the_bundled_checkpoints_are_read() {
    let gqla = ModelConfig::load(&root().join("checkpoints/tiny-glm-gqla")).unwrap();
    assert_eq!((gqla.heads(), gqla.groups(), gqla.rope_dim(), gqla.mtp_layers), (16, 8, 16, 1));
    assert_eq!(gqla.mlp, [Mlp::Dense { width: 512 }, Mlp::Sparse, Mlp::Sparse, Mlp::Sparse]);
    assert_eq!((gqla.bos, gqla.eos.as_slice()), (Some(1), &[0][..]));
    let mla = ModelConfig::load(&root().join("checkpoints/tiny-glm-mla")).unwrap();
    assert_eq!((mla.heads(), mla.groups(), mla.moe), (16, 16, None));
    let llama = ModelConfig::load(&root().join("checkpoints/tiny-llama-gqa")).unwrap();
    assert_eq!((llama.heads(), llama.groups(), llama.rope_dim()), (16, 8, 32));
    assert!(!llama.rope.interleave);
}

#[test]
fn the_fixtures_are_read() {
    let load = |name: &str| ModelConfig::load(&root().join("tests/data/fixtures").join(name)).unwrap();
    let odd = load("oddheads-yarn-moe");
    assert_eq!((odd.heads(), odd.groups(), odd.rope.interleave), (24, 4, false));
    let Attention::Latent(latent) = &odd.attention else { panic!("not latent") };
    assert_eq!(latent.q_rank, None);
    let RopeScaling::Yarn { factor, original, mscale, attention_factor, truncate, .. } = odd.rope.scaling else {
        panic!("not yarn")
    };
    assert_eq!((factor, original, mscale, attention_factor, truncate), (4.0, 128.0, 1.0, None, true));
    let moe = odd.moe.unwrap();
    assert_eq!((moe.scoring, moe.groups, moe.top_groups, moe.scale), (Scoring::NoAuxTc, 2, 1, 1.8));
    let v3 = load("deepseek-v3-mla");
    assert_eq!((v3.mlp.len(), v3.mlp[0], v3.mlp[1]), (3, Mlp::Dense { width: 256 }, Mlp::Sparse));
    assert_eq!((v3.mtp_layers, v3.rope.interleave), (1, true));
    assert_eq!(load("realhead-h32g8").moe, None);
}
