//! Which files of a directory hold the weights, and what `model.safetensors.index.json` says about them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::header::shown;
use crate::config::json;
use crate::error::{Error, Result};

/// The index's name in every checkpoint.
const INDEX: &str = "model.safetensors.index.json";
/// Largest index that is read, in bytes.
const LARGEST: u64 = 100_000_000;

/// The weight files of a checkpoint.
pub(super) struct Files {
    /// Their paths, each once, sorted.
    pub paths: Vec<PathBuf>,
    /// The index, when there is one, and for each tensor the position in `paths` of the file that it names.
    pub index: Option<(PathBuf, BTreeMap<String, usize>)>,
}

/// Finds the weight files of `directory`: those of the index, or model.safetensors, or all model*.safetensors.
pub(super) fn find(directory: &Path) -> Result<Files> {
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|e| Error::io(directory, e))? {
        let entry = entry.map_err(|e| Error::io(directory, e))?;
        names.extend(entry.file_name().to_str().map(str::to_owned)); // a name that is not UTF-8 is none of a model's
    }
    names.sort();
    if names.iter().any(|name| name == INDEX) {
        return indexed(directory, names.iter().any(|name| name == "model.safetensors"));
    }
    let ends = |name: &str, with: &str| Path::new(name).extension() == Some(OsStr::new(with));
    let mut chosen: Vec<&String> = names.iter().filter(|n| n.starts_with("model") && ends(n, "safetensors")).collect();
    if let Some(only) = chosen.iter().find(|name| *name.as_str() == *"model.safetensors") {
        chosen = vec![only];
    }
    if chosen.is_empty() {
        let other = names.iter().find(|n| ["bin", "pt", "pth"].iter().any(|with| ends(n, with)));
        return Err(match other {
            Some(other) => Error::checkpoint(
                directory.join(other),
                "holds pickled weights, which can run code and are not read: save the model as safetensors \
                 (in transformers, model.save_pretrained(directory, safe_serialization=True))",
            ),
            None => {
                Error::checkpoint(directory, "holds no model.safetensors, no model*.safetensors and no index of them")
            }
        });
    }
    complete(directory, &chosen)?;
    Ok(Files { paths: chosen.into_iter().map(|name| directory.join(name)).collect(), index: None })
}

/// Refuses a set of `…-00001-of-00003.safetensors` with one missing.
fn complete(directory: &Path, names: &[&String]) -> Result<()> {
    for name in names {
        let parts = name.strip_suffix(".safetensors").and_then(|stem| stem.rsplit_once("-of-"));
        let Some((head, count)) = parts else { continue };
        let Some((stem, number)) = head.rsplit_once('-') else { continue };
        let Ok(total) = count.parse::<u32>() else { continue };
        let digits = number.len();
        let sibling = |i: u32| format!("{stem}-{i:0digits$}-of-{count}.safetensors");
        // One more name than there are files is enough to find a missing one, however large the count claims to be.
        let most = total.min(names.len() as u32 + 1);
        if let Some(missing) = (1..=most).map(sibling).find(|s| !names.contains(&s)) {
            return Err(Error::checkpoint(
                directory.join(missing),
                format!("is missing, but {name} is there: copy it too"),
            ));
        }
    }
    Ok(())
}

fn indexed(directory: &Path, single: bool) -> Result<Files> {
    let index = directory.join(INDEX);
    let refuse = |what: String| Err(Error::checkpoint(&index, what));
    let length = std::fs::metadata(&index).map_err(|e| Error::io(&index, e))?;
    if !length.is_file() || length.len() > LARGEST {
        return refuse(format!("is no regular file of at most {LARGEST} bytes"));
    }
    let text = std::fs::read(&index).map_err(|e| Error::io(&index, e))?;
    let value = json::parse(&text).map_err(|e| Error::checkpoint(&index, format!("is not valid JSON: {e}")))?;
    let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
        return refuse("has no weight_map object".into());
    };
    if map.is_empty() {
        return refuse("its weight_map is empty".into());
    }
    let mut of_name: BTreeMap<&str, PathBuf> = BTreeMap::new();
    for (tensor, name) in map {
        let Some(name) = name.as_str() else {
            return refuse(format!("tensor {}: its file is {name}, should be a name", shown(tensor)));
        };
        if !of_name.contains_key(name) {
            let path = inside(directory, name).map_err(|what| {
                Error::checkpoint(&index, format!("tensor {}: its file {}: {what}", shown(tensor), shown(name)))
            })?;
            of_name.insert(name, path);
        }
    }
    if single && !of_name.contains_key("model.safetensors") {
        return refuse(
            "does not name model.safetensors, which stands beside it: remove the one that is out of date".into(),
        );
    }
    let position: BTreeMap<&str, usize> = of_name.keys().enumerate().map(|(i, name)| (*name, i)).collect();
    let tensors =
        map.iter().filter_map(|(tensor, name)| Some((tensor.clone(), *position.get(name.as_str()?)?))).collect();
    Ok(Files { paths: of_name.into_values().collect(), index: Some((index, tensors)) })
}

/// The path of an indexed file, which must stand inside `directory`: neither its name nor a symbolic link may lead out
/// of it, but for the links of a Hugging Face cache, whose snapshots point at `../../blobs`.
fn inside(directory: &Path, name: &str) -> std::result::Result<PathBuf, String> {
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_));
    if name.is_empty() || name.contains(['\\', '\0']) || !Path::new(name).components().all(plain) {
        return Err("leads out of the checkpoint's directory, and is refused".into());
    }
    if Path::new(name).extension() != Some(OsStr::new("safetensors")) {
        return Err("is no .safetensors file: save the model as safetensors".into());
    }
    let path = directory.join(name);
    let real = path.canonicalize().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => "is missing: copy it into the checkpoint's directory".to_string(),
        _ => e.to_string(),
    })?;
    let home = directory.canonicalize().map_err(|e| e.to_string())?;
    let blobs = home
        .join("../../blobs")
        .canonicalize()
        .ok()
        .filter(|_| home.parent().and_then(Path::file_name) == Some(OsStr::new("snapshots")));
    if real.starts_with(&home) || blobs.is_some_and(|blobs| real.starts_with(blobs)) {
        return Ok(path);
    }
    Err(format!(
        "is a link out of the checkpoint's directory, to {}, and is refused: move the file here",
        real.display()
    ))
}
