//! Reading safetensors: safe on any bytes, refusing by file and tensor, and lean — a rank reads its part alone.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use gqla::checkpoint::{Checkpoint, Dtype, header};
use proptest::prelude::*;
use tempfile::TempDir;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

/// A tensor for [`file`]: name, type, shape, bytes.
type Given<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

/// A safetensors file of these tensors, one after the other.
fn file(tensors: &[Given<'_>]) -> Vec<u8> {
    let (mut entries, mut data) = (vec![], vec![]);
    for (name, dtype, shape, bytes) in tensors {
        let end = data.len() + bytes.len();
        let offsets = [data.len(), end];
        entries.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}"#));
        data.extend_from_slice(bytes);
    }
    raw(&format!("{{{}}}", entries.join(",")), &data)
}

/// A file of this header and these bytes.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A directory with these files.
fn directory(files: &[(&str, Vec<u8>)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        fs::write(directory.path().join(name), contents).unwrap();
    }
    directory
}

/// The message with which `directory` is refused; every one of `parts` must be in it.
fn refused(directory: &Path, parts: &[&str]) {
    let message = match Checkpoint::open(directory) {
        Ok(_) => panic!("accepted, though it should name {parts:?}"),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

fn one(contents: Vec<u8>) -> TempDir {
    directory(&[("model.safetensors", contents)])
}

// ---- what is there

#[test]
fn bundled_checkpoints_and_fixtures_open() {
    for (name, tensors) in
        [("checkpoints/tiny-glm-gqla", 173), ("checkpoints/tiny-glm-mla", 51), ("checkpoints/tiny-llama-gqa", 48)]
    {
        assert_eq!(Checkpoint::open(&root().join(name)).unwrap().names().len(), tensors, "{name}");
    }
    for (name, tensors) in [("deepseek-v3-mla", 139), ("oddheads-yarn-moe", 85), ("realhead-h32g8", 23)] {
        let checkpoint = Checkpoint::open(&root().join("tests/data/fixtures").join(name)).unwrap();
        assert_eq!(checkpoint.names().len(), tensors, "{name}");
    }
}

#[test]
fn values_are_those_of_the_safetensors_library() {
    let file = root().join("tests/data/fixtures/deepseek-v3-mla");
    let bytes = fs::read(file.join("model.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ours = Checkpoint::open(&file).unwrap();
    assert_eq!(ours.names().len(), theirs.names().len());
    for name in theirs.names() {
        let tensor = theirs.tensor(name).unwrap();
        let (rows, cols) = match *tensor.shape() {
            [n] => (n, 1),
            [rows, cols] => (rows, cols),
            _ => panic!("{name}"),
        };
        let slice = ours.slice(name, tensor.shape(), 0..rows, 0..cols).unwrap();
        let mut row = vec![0f32; cols];
        let mut bits = vec![];
        for i in 0..rows {
            slice.read_f32(i, &mut row);
            bits.extend(row.iter().map(|v| v.to_bits()));
        }
        let expected: Vec<u32> = match tensor.dtype() {
            safetensors::Dtype::BF16 => {
                tensor.data().chunks(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])) << 16).collect()
            }
            safetensors::Dtype::F32 => {
                tensor.data().chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(bits, expected, "{name}");
    }
    assert!(ours.unclaimed().is_empty());
}

#[test]
fn ranks_partition_a_tensor_by_rows_and_by_columns() {
    let checkpoint = Checkpoint::open(&root().join("checkpoints/tiny-llama-gqa")).unwrap();
    let (name, shape) = ("model.layers.1.self_attn.o_proj.weight", [256, 512]);
    let read = |rows: std::ops::Range<usize>, cols: std::ops::Range<usize>| -> Vec<Vec<u16>> {
        let slice = checkpoint.slice(name, &shape, rows.clone(), cols.clone()).unwrap();
        assert_eq!((slice.rows(), slice.cols(), slice.dtype()), (rows.len(), cols.len(), Dtype::Bf16));
        (0..slice.rows())
            .map(|i| {
                let mut row = vec![0; slice.cols()];
                slice.read_bf16(i, &mut row);
                row
            })
            .collect()
    };
    let whole = read(0..256, 0..512);
    for world in [2, 4, 8] {
        let part = |rank: usize, of: usize| of * rank / world..of * (rank + 1) / world;
        let by_rows: Vec<_> = (0..world).flat_map(|rank| read(part(rank, 256), 0..512)).collect();
        assert!(by_rows == whole);
        let columns: Vec<_> = (0..world).map(|rank| read(0..256, part(rank, 512))).collect();
        let by_columns: Vec<Vec<u16>> = (0..256).map(|i| columns.iter().flat_map(|c| c[i].clone()).collect()).collect();
        assert!(by_columns == whole);
    }
    let slice = checkpoint.slice(name, &shape, 10..20, 0..512).unwrap().subrows(3..5);
    let mut row = vec![0; 512];
    slice.read_bf16(1, &mut row);
    assert!(slice.rows() == 2 && row == whole[14]);
}

#[test]
fn every_type_is_converted_exactly_or_to_the_nearest_even() {
    // 1 + 2^-9 lies above the middle of two bf16 values; 1 + 2^-8 is the middle, and goes to the even one, 1.
    let values = [1.0f32, -2.5, 1.0 + 3.0 / 512.0, 1.0 + 1.0 / 256.0, 65504.0, 0.0];
    let halves: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
    // One of the two names leaves the data at an odd address.
    for name in ["h", "ha"] {
        let at = one(file(&[(name, "F16", &[6], halves.clone())]));
        assert_eq!(Checkpoint::open(at.path()).unwrap().vector(name, 6).unwrap(), values);
    }
    let at = one(file(&[("f", "F32", &[2, 3], floats(&values))]));
    let checkpoint = Checkpoint::open(at.path()).unwrap();
    let slice = checkpoint.slice("f", &[2, 3], 0..2, 0..3).unwrap();
    assert_eq!(slice.dtype(), Dtype::F32);
    let mut row = [0; 3];
    slice.read_bf16(0, &mut row);
    assert_eq!(row, [0x3f80, 0xc020, 0x3f81]);
    slice.read_bf16(1, &mut row);
    assert_eq!(row, [0x3f80, 0x4780, 0]);
}

#[test]
fn asking_for_a_tensor_claims_it() {
    let at = one(file(&[("a", "F32", &[2], floats(&[1.0, 2.0])), ("b", "F32", &[1, 2], floats(&[3.0, 4.0]))]));
    let checkpoint = Checkpoint::open(at.path()).unwrap();
    assert_eq!(checkpoint.unclaimed(), ["a", "b"]);
    checkpoint.vector("a", 2).unwrap();
    assert_eq!(checkpoint.unclaimed(), ["b"]);
    assert!(checkpoint.has("b", false) && !checkpoint.has("c", true));
}

#[test]
fn the_fingerprint_follows_configuration_and_headers_but_not_the_place() {
    let contents = file(&[("a", "F32", &[1], floats(&[1.0]))]);
    let print = |config: &str, contents: &Vec<u8>| {
        let at = directory(&[("config.json", config.into()), ("model.safetensors", contents.clone())]);
        Checkpoint::open(at.path()).unwrap().fingerprint()
    };
    let first = print("{}", &contents);
    assert_eq!(first, print("{}", &contents));
    assert_ne!(first, print("{ }", &contents));
    assert_ne!(first, print("{}", &file(&[("b", "F32", &[1], floats(&[1.0]))])));
}

#[test]
fn made_up_weights_are_the_same_in_every_slice_and_look_like_weights() {
    let dummy = Checkpoint::dummy(0);
    assert!(dummy.has("anything", true) && !dummy.has("anything", false));
    assert!(dummy.names().is_empty() && dummy.unclaimed().is_empty());
    let (mut whole, mut part) = (vec![0u16; 1001], vec![0u16; 500]);
    let all = dummy.slice("w", &[1000, 1001], 0..1000, 0..1001).unwrap();
    let some = dummy.slice("w", &[1000, 1001], 7..900, 333..833).unwrap();
    let (mut sum, mut squares) = (0.0, 0.0);
    for i in 0..1000 {
        all.read_bf16(i, &mut whole);
        if (7..900).contains(&i) {
            some.read_bf16(i - 7, &mut part);
            assert_eq!(part, whole[333..833]);
        }
        let mut row = vec![0f32; 1001];
        all.read_f32(i, &mut row);
        sum += row.iter().map(|v| f64::from(*v)).sum::<f64>();
        squares += row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    }
    let count = 1001.0 * 1000.0;
    assert!((sum / count).abs() < 1e-4, "mean {}", sum / count);
    assert!(((squares / count).sqrt() - 0.02).abs() < 1e-4, "deviation {}", (squares / count).sqrt());
    assert_eq!(dummy.vector("model.norm.weight", 3).unwrap(), [1.0; 3]);
    assert_ne!(dummy.vector("a.bias", 64).unwrap(), dummy.vector("b.bias", 64).unwrap());
}

// ---- what is refused

#[test]
fn another_shape_or_type_than_the_configuration_says_is_refused() {
    let at = one(file(&[("w", "F32", &[2, 3], floats(&[0.0; 6])), ("q", "F8_E4M3", &[2], vec![0; 2])]));
    let checkpoint = Checkpoint::open(at.path()).unwrap();
    let message = |result: gqla::Result<()>| result.unwrap_err().to_string();
    let shape = message(checkpoint.slice("w", &[3, 2], 0..3, 0..2).map(drop));
    for part in ["model.safetensors", "\"w\"", "[2, 3]", "[3, 2]"] {
        assert!(shape.contains(part), "{shape}");
    }
    let dtype = message(checkpoint.vector("q", 2).map(drop));
    assert!(dtype.contains("\"q\"") && dtype.contains("F8_E4M3") && dtype.contains("bfloat16"), "{dtype}");
    let missing = message(checkpoint.vector("absent.weight", 2).map(drop));
    assert!(missing.contains("\"absent.weight\"") && missing.contains(at.path().to_str().unwrap()), "{missing}");
    assert_eq!(checkpoint.unclaimed(), ["q", "w"], "a refused tensor is not claimed");
    assert!(matches!(checkpoint.slice("w", &[2, 3], 0..3, 0..3), Err(gqla::Error::Internal(_))));
}

#[test]
fn damaged_headers_are_refused_with_file_and_tensor() {
    let f32_of =
        |offsets: &str, shape: &str| format!(r#""t":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#);
    let t = |offsets: &str, shape: &str| format!("{{{}}}", f32_of(offsets, shape));
    let other = |offsets: &str| {
        format!(r#"{{{},"u":{{"dtype":"U8","shape":[4],"data_offsets":{offsets}}}}}"#, f32_of("[0,4]", "[1]"))
    };
    let twice = format!("{{{},{}}}", f32_of("[0,4]", "[1]"), f32_of("[4,8]", "[1]"));
    let data = [0u8; 8];
    for (contents, parts) in [
        (vec![], vec!["0 bytes", "truncated"]),
        (vec![1, 2, 3], vec!["3 bytes", "truncated"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0".to_vec(), vec!["git lfs pull"]),
        (u64::MAX.to_le_bytes().to_vec(), vec!["18446744073709551615"]),
        ([&100_000_001u64.to_le_bytes()[..], b"{}"].concat(), vec!["100000001"]),
        ([&1000u64.to_le_bytes()[..], b"{}"].concat(), vec!["1000", "truncated"]),
        (raw("[]", &[]), vec!["no JSON object"]),
        (raw("", &[]), vec!["no JSON object"]),
        (raw("{\"t\":", &[]), vec!["damaged"]),
        (raw("{\"t\":3}", &[]), vec!["\"t\"", "dtype, shape and data_offsets"]),
        (raw("{\"t\":{\"dtype\":\"F32\"}}", &[]), vec!["\"t\"", "shape is missing"]),
        (raw("{\"t\":{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}}", &data), vec!["\"t\"", "F31"]),
        (
            raw("{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}", &data),
            vec!["\"t\"", "\"x\""],
        ),
        (raw("{\"__metadata__\":{\"a\":1}}", &[]), vec!["damaged"]),
        (raw(&t("[0,4]", "[-1]"), &data), vec!["\"t\""]),
        (raw(&t("[0,4]", "[1,1,1,1,1,1,1,1,1]"), &data), vec!["\"t\"", "dimensions"]),
        (raw(&t("[0,4]", "[4294967296,4294967296,4294967296]"), &data), vec!["\"t\"", "4294967296"]),
        (raw(&t("[0,0]", "[0,18446744073709551615]"), &[]), vec!["\"t\"", "18446744073709551615"]),
        (raw(&t("[4,0]", "[1]"), &data), vec!["\"t\"", "before"]),
        (raw(&t("[0,18446744073709551615]", "[2]"), &data), vec!["\"t\"", "truncated"]),
        (raw(&t("[0,12]", "[3]"), &data), vec!["\"t\"", "12", "8", "truncated"]),
        (raw(&t("[0,8]", "[3]"), &data), vec!["\"t\"", "[3]", "12", "8"]),
        (raw(&t("[4,8]", "[1]"), &data), vec!["\"t\"", "hole"]),
        (raw(&t("[0,4]", "[1]"), &data), vec!["\"t\"", "8 bytes"]),
        (raw(&other("[2,6]"), &data), vec!["\"u\"", "\"t\"", "overlap"]),
        (raw(&other("[4,8]"), &[0; 9]), vec!["\"u\"", "9 bytes"]),
        (raw(&twice, &data), vec!["\"t\"", "twice"]),
    ] {
        let at = one(contents);
        refused(at.path(), &[vec!["model.safetensors"], parts].concat());
    }
    let empty = one(raw(r#"{"e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}}"#, &[]));
    assert_eq!(Checkpoint::open(empty.path()).unwrap().names(), ["e"], "a tensor without elements is none of these");
}

#[test]
fn pickled_missing_and_incomplete_checkpoints_are_refused_with_the_remedy() {
    for name in ["pytorch_model.bin", "model.pt", "consolidated.00.pth"] {
        refused(directory(&[(name, vec![1])]).path(), &[name, "safetensors"]);
    }
    refused(directory(&[]).path(), &["model.safetensors"]);
    refused(Path::new("no/such/directory"), &["no/such/directory"]);
    let shard = || file(&[("a", "F32", &[1], floats(&[1.0]))]);
    let at =
        directory(&[("model-00001-of-00003.safetensors", shard()), ("model-00003-of-00003.safetensors", file(&[]))]);
    refused(at.path(), &["model-00002-of-00003.safetensors", "missing"]);
    let at = directory(&[("model-00001-of-00002.safetensors", shard()), ("model-00002-of-00002.safetensors", shard())]);
    refused(at.path(), &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "\"a\""]);
    fs::write(at.path().join("model-00002-of-00002.safetensors"), file(&[("b", "F32", &[1], floats(&[2.0]))])).unwrap();
    assert_eq!(Checkpoint::open(at.path()).unwrap().names(), ["a", "b"], "an index is not needed");
    let at = one(shard());
    fs::create_dir(at.path().join("model-extra.safetensors")).unwrap();
    assert!(Checkpoint::open(at.path()).is_ok(), "model.safetensors alone is taken when it is there");
    fs::remove_file(at.path().join("model.safetensors")).unwrap();
    refused(at.path(), &["model-extra.safetensors", "regular file"]);
}

#[test]
fn an_index_may_not_lead_out_nor_lie() {
    let a = || ("a.safetensors", file(&[("a", "F32", &[1], floats(&[1.0]))]));
    let b = || ("b.safetensors", file(&[("b", "F32", &[1], floats(&[1.0]))]));
    let with = |index: &str| directory(&[a(), b(), ("model.safetensors.index.json", index.into())]);
    let map = |place: &str| with(&format!(r#"{{"weight_map":{{"a":"a.safetensors","b":{place}}}}}"#));
    let index = "model.safetensors.index.json";
    let outside = directory(&[("out.safetensors", b().1)]);
    let absolute = outside.path().join("out.safetensors");
    let up = format!("\"../{}/out.safetensors\"", outside.path().file_name().unwrap().to_str().unwrap());
    for place in [format!("{absolute:?}"), up, "\"\"".into(), "\"..\"".into(), "\"x/../../b.safetensors\"".into()] {
        refused(map(&place).path(), &[index, "\"b\"", "leads out"]);
    }
    refused(map("\"c.safetensors\"").path(), &[index, "\"b\"", "c.safetensors", "missing"]);
    refused(map("\"a.safetensors\"").path(), &[index, "\"b\"", "a.safetensors"]);
    refused(map("\"b.bin\"").path(), &[index, "\"b\"", "b.bin", "safetensors"]);
    refused(map("7").path(), &[index, "\"b\""]);
    refused(with("{}").path(), &[index, "weight_map"]);
    refused(with("{").path(), &[index, "JSON"]);
    refused(with(r#"{"weight_map":{}}"#).path(), &[index, "empty"]);
    refused(with(r#"{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}"#).path(), &[index, "\"a\"", "twice"]);
    assert_eq!(Checkpoint::open(map("\"b.safetensors\"").path()).unwrap().names(), ["a", "b"]);

    let stale = map("\"b.safetensors\"");
    fs::write(stale.path().join("model.safetensors"), a().1).unwrap();
    refused(stale.path(), &[index, "model.safetensors", "remove"]);
}

#[cfg(unix)]
#[test]
fn links_of_an_index_stay_inside_but_for_those_of_the_hub_cache() {
    use std::os::unix::fs::symlink;
    let contents = file(&[("a", "F32", &[1], floats(&[1.0]))]);
    let index = r#"{"weight_map":{"a":"a.safetensors"}}"#;
    let (outside, hub) = (directory(&[("out", contents.clone())]), directory(&[]));
    let snapshot = hub.path().join("snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(hub.path().join("blobs")).unwrap();
    fs::write(hub.path().join("blobs/4567"), &contents).unwrap();
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    symlink("../../blobs/4567", snapshot.join("a.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(&snapshot).unwrap().names(), ["a"]);
    fs::remove_file(snapshot.join("a.safetensors")).unwrap();
    symlink(outside.path().join("out"), snapshot.join("a.safetensors")).unwrap();
    refused(&snapshot, &["\"a\"", "link out of"]);
}

// ---- no bytes panic

/// A real file to mutate, header and data.
static REAL: LazyLock<Vec<u8>> =
    LazyLock::new(|| fs::read(root().join("tests/data/fixtures/oddheads-yarn-moe/model.safetensors")).unwrap());

thread_local!(static MUTANT: RefCell<Vec<u8>> = RefCell::new(REAL.clone()));

/// Parses, and holds what comes out to its promises: bytes within the file, apart from each other, of the right size.
fn sound(contents: &[u8]) -> bool {
    let Ok(tensors) = header::parse(Path::new("file.safetensors"), contents).map_err(|error| {
        assert!(error.to_string().starts_with("file.safetensors: "), "{error}");
    }) else {
        return false;
    };
    let mut ends: Vec<_> = tensors.iter().map(|t| (t.bytes.start, t.bytes.end)).collect();
    ends.sort_unstable();
    assert!(ends.windows(2).all(|pair| pair[0].1 == pair[1].0));
    assert!(ends.last().is_none_or(|last| last.1 == contents.len()));
    assert!(tensors.windows(2).all(|pair| pair[0].name < pair[1].name));
    true
}

/// JSON that looks like a header, with wrong things in every place.
fn header_like() -> impl Strategy<Value = String> {
    let number = prop_oneof![
        Just("0".to_string()),
        (0u64..64).prop_map(|v| v.to_string()),
        any::<u64>().prop_map(|v| v.to_string()),
        any::<i64>().prop_map(|v| v.to_string()),
        Just("1e400".into()),
        Just("18446744073709551616".into()),
    ];
    let list = prop::collection::vec(number, 0..5).prop_map(|v| format!("[{}]", v.join(",")));
    let value = prop_oneof![
        4 => list,
        1 => Just("\"F32\"".to_string()),
        1 => Just("\"U8\"".to_string()),
        1 => Just("null".to_string()),
        1 => Just("{}".to_string()),
        1 => "\"[ -~]{0,8}\"",
    ];
    let key = prop_oneof![Just("dtype"), Just("shape"), Just("data_offsets"), Just("extra")];
    let field = (key, value).prop_map(|(key, value)| format!("\"{key}\":{value}"));
    let entry = prop::collection::vec(field, 0..5).prop_map(|v| format!("{{{}}}", v.join(",")));
    let name = prop_oneof![Just("a".to_string()), Just("__metadata__".to_string()), "[a-z]{0,3}"];
    prop::collection::vec((name, entry), 0..4).prop_map(|v| {
        let entries: Vec<String> = v.iter().map(|(name, entry)| format!("\"{name}\":{entry}")).collect();
        format!("{{{}}}", entries.join(","))
    })
}

#[test]
fn the_real_file_is_sound() {
    assert!(sound(&REAL));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_flipped_byte_panics(flips in prop::collection::vec((0usize..9544, any::<u8>()), 1..6)) {
        MUTANT.with_borrow_mut(|bytes| {
            for (at, value) in &flips {
                bytes[*at] = *value;
            }
            sound(bytes);
            for (at, _) in &flips {
                bytes[*at] = REAL[*at];
            }
        });
    }

    #[test]
    fn no_length_of_the_header_panics(length in prop_oneof![any::<u64>(), 0u64..20_000]) {
        MUTANT.with_borrow_mut(|bytes| {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            let accepted = sound(bytes);
            bytes[..8].copy_from_slice(&REAL[..8]);
            assert_eq!(accepted, length.to_le_bytes() == REAL[..8]);
        });
    }

    #[test]
    fn every_truncated_file_is_refused(length in prop_oneof![0usize..20_000, 0usize..1_000_000]) {
        prop_assert!(!sound(&REAL[..length.min(REAL.len() - 1)]));
    }

    #[test]
    fn no_digit_of_the_header_panics(at in 8usize..9544, digit in b'0'..=b'9') {
        MUTANT.with_borrow_mut(|bytes| {
            if bytes[at].is_ascii_digit() {
                bytes[at] = digit;
                sound(bytes);
                bytes[at] = REAL[at];
            }
        });
    }

    #[test]
    fn no_json_panics(header in header_like(), data in 0usize..64) {
        sound(&raw(&header, &vec![0; data]));
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        sound(&bytes);
        sound(&raw(&String::from_utf8_lossy(&bytes), &[]));
    }
}
