//! The C interface: the header in the repository is the one that the source makes, and a C program uses it.

#[path = "common/model.rs"]
mod model;

use std::ffi::{CStr, CString};
use std::process::Command;

use gqla::ffi::*;

fn header() -> String {
    let config = cbindgen::Config::from_file(model::at("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_config(config).with_src(model::at("src/ffi.rs")).generate().unwrap();
    let mut text = vec![];
    bindings.write(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn the_header_is_current() {
    let file = model::at("include/gqla.h");
    if std::env::var_os("GQLA_WRITE_HEADER").is_some() {
        std::fs::write(&file, header()).unwrap();
    }
    let there = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(there == header(), "write it again: GQLA_WRITE_HEADER=1 cargo test --test ffi");
}

#[test]
fn a_c_program_embeds_the_engine() {
    let work = tempfile::tempdir().unwrap();
    let program = work.path().join("embed");
    // Cargo puts the library of a test's build beside the test.
    let library = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    assert!(library.join("libgqla.so").is_file(), "no libgqla.so in {}", library.display());
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror"]).arg(model::at("examples/embed.c"));
    cc.arg("-I").arg(model::at("include")).arg("-L").arg(&library).arg("-lgqla").arg("-o").arg(&program);
    cc.arg(format!("-Wl,-rpath,{}", library.display()));
    let built = cc.output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let run = |checkpoint: &std::path::Path| {
        // Cargo's own path would find the library of an earlier `cargo build` first.
        let command = &mut Command::new(&program);
        command.env("LD_LIBRARY_PATH", &library).arg(checkpoint).arg("def fibonacci(n):").output().unwrap()
    };
    let output = run(&model::checkpoint("tiny-glm-gqla").0);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("[length, 24 tokens]") && out.contains("64 of 64 blocks free"), "{out}");
    assert!(err.contains("after the end: the engine is shutting down") || err.contains("stopped"), "{err}");
    let output = run(work.path());
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && err.contains("config.json") && err.contains("(3)"), "{err}");
}

#[test]
fn wrong_arguments_are_told_not_followed() {
    let mut engine = std::ptr::null_mut();
    let mut stream = std::ptr::null_mut();
    let last = || {
        // SAFETY: the library's own text, which lives until the next failed call.
        unsafe { CStr::from_ptr(gqla_last_error()) }.to_str().unwrap().to_string()
    };
    let model = CString::new(model::checkpoint("tiny-glm-gqla").0.to_str().unwrap()).unwrap();
    // SAFETY: null pointers are allowed everywhere, the others are live.
    unsafe {
        assert_eq!(gqla_start(std::ptr::null(), std::ptr::null(), &mut engine), GqlaStatus::Invalid);
        assert!(last().contains("model is NULL"));
        assert_eq!(gqla_submit(engine, std::ptr::null(), 0, std::ptr::null(), &mut stream), GqlaStatus::Invalid);
        assert!(last().contains("engine is NULL"));
        assert_eq!(gqla_poll(stream, 0, std::ptr::null_mut()), GqlaStatus::Invalid);
        assert_eq!(gqla_options_default(std::ptr::null_mut()), GqlaStatus::Invalid);
        let mut options = std::mem::MaybeUninit::uninit();
        assert_eq!(gqla_options_default(options.as_mut_ptr()), GqlaStatus::Ok);
        let mut options = options.assume_init();
        options.path = 9;
        assert_eq!(gqla_start(model.as_ptr(), &options, &mut engine), GqlaStatus::Invalid);
        options.path = GqlaPath::Gqa as i32;
        options.ranks = 3;
        assert_eq!(gqla_start(model.as_ptr(), &options, &mut engine), GqlaStatus::Sharding);
        options.ranks = 1;
        options.cache_tokens = 1024;
        (options.max_sequences, options.max_waiting) = (1, 0);
        assert_eq!(gqla_start(model.as_ptr(), &options, &mut engine), GqlaStatus::Ok);
        assert_eq!(gqla_submit(engine, std::ptr::null(), 3, std::ptr::null(), &mut stream), GqlaStatus::Invalid);
        assert_eq!(gqla_submit(engine, [1, 99999].as_ptr(), 2, std::ptr::null(), &mut stream), GqlaStatus::Invalid);
        assert!(last().contains("99999"));
        let mut sampling = std::mem::MaybeUninit::uninit();
        assert_eq!(gqla_sampling_default(sampling.as_mut_ptr()), GqlaStatus::Ok);
        let mut sampling = sampling.assume_init();
        sampling.max_tokens = 900;
        sampling.ignore_eos = 1;
        assert_eq!(gqla_submit(engine, [1, 5].as_ptr(), 2, &sampling, &mut stream), GqlaStatus::Ok);
        let mut second = std::ptr::null_mut();
        assert_eq!(gqla_submit(engine, [1, 5].as_ptr(), 2, &sampling, &mut second), GqlaStatus::Full);
        assert!(second.is_null());
        let mut length = 0;
        let text = c"import os";
        assert_eq!(gqla_encode(engine, text.as_ptr(), std::ptr::null_mut(), &mut length), GqlaStatus::TooSmall);
        assert!(length > 1);
        assert_eq!(gqla_cancel(stream), GqlaStatus::Ok);
        assert_eq!(gqla_cancel(stream), GqlaStatus::Ok);
        let mut event = std::mem::MaybeUninit::uninit();
        assert_eq!(gqla_poll(stream, 10, event.as_mut_ptr()), GqlaStatus::End);
        gqla_stream_free(stream);
        gqla_stream_free(std::ptr::null_mut());
        assert_eq!(gqla_shutdown(engine), GqlaStatus::Ok);
        assert_eq!(gqla_drain(engine, 5), GqlaStatus::Ok);
        gqla_free(engine);
        gqla_free(std::ptr::null_mut());
    }
}
