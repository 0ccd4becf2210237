//! NVIDIA's libraries missing or too old, as a user sees it: stand-ins, built here with `cc`, for a machine with GPUs.

#[path = "common/mod.rs"]
mod common;
#[path = "common/model.rs"]
mod model;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use common::{Job, mpirun};
use tempfile::TempDir;

/// A driver for CUDA 13.0 that shows two GPUs of compute capability 9.0.
const DRIVER: &str = "
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetName(char* s, int n, int d) { __builtin_strcpy(s, \"stand-in\"); return 0; }
int cuDeviceTotalMem_v2(unsigned long* b, int d) { *b = 1ul << 36; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : 132; return 0; }
int cuLaunchKernelEx(void) { return 999; }
";
const NVRTC: &str = "
int nvrtcVersion(int* a, int* b) { *a = 13; *b = 0; return 0; }
int nvrtcCreateProgram(void) { return 1; } int nvrtcCompileProgram(void) { return 1; }
int nvrtcDestroyProgram(void) { return 1; } int nvrtcGetPTXSize(void) { return 1; } int nvrtcGetPTX(void) { return 1; }
int nvrtcGetProgramLogSize(void) { return 1; } int nvrtcGetProgramLog(void) { return 1; }
";
const CUBLASLT: &str = "
unsigned long cublasLtGetVersion(void) { return 130000; }
int cublasLtCreate(void) { return 1; } int cublasLtDestroy(void) { return 1; }
int cublasLtMatmulDescCreate(void) { return 1; } int cublasLtMatmulDescSetAttribute(void) { return 1; }
int cublasLtMatrixLayoutCreate(void) { return 1; } int cublasLtMatmulPreferenceCreate(void) { return 1; }
int cublasLtMatmulPreferenceSetAttribute(void) { return 1; } int cublasLtMatmulPreferenceDestroy(void) { return 1; }
int cublasLtMatmulAlgoGetHeuristic(void) { return 1; } int cublasLtMatmul(void) { return 1; }
";
const NCCL: &str = "
int ncclGetVersion(int* v) { *v = 20909; return 0; }
int ncclGetUniqueId(void) { return 1; } int ncclCommInitRank(void) { return 1; } int ncclAllReduce(void) { return 1; } int ncclAllGather(void) { return 1; }
int ncclCommGetAsyncError(void) { return 1; } int ncclCommAbort(void) { return 1; } int ncclCommDestroy(void) { return 1; }
char* ncclGetErrorString(int e) { return \"\"; } char* ncclGetLastError(void* c) { return \"\"; }
";

/// Stand-ins in a folder of their own.
struct Libraries(TempDir);

impl Libraries {
    /// `None` (said on stderr) where there is a real driver, which would be found beside the stand-in.
    fn new() -> Option<Libraries> {
        if let Ok(gpus) = gqla::backend::cuda::available() {
            eprintln!("NOT RUN: there are {} real GPUs here", gpus.len());
            return None;
        }
        Some(Libraries(tempfile::tempdir().unwrap()))
    }

    fn add(&self, name: &str, source: &str) -> PathBuf {
        let (code, library) = (self.0.path().join(format!("{name}.c")), self.0.path().join(name));
        std::fs::write(&code, source).unwrap();
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-w", &format!("-Wl,-soname,{name}"), "-o"])
            .arg(&library)
            .arg(&code)
            .status()
            .unwrap();
        assert!(status.success());
        library
    }
}

fn generate(command: &mut Command, device: &str, libraries: &[(&str, &Path)]) -> Output {
    command.args(["generate", "--max-tokens", "2", "--prompt", "import", "--device", device, "--model"]);
    command.arg(model::checkpoint("tiny-glm-gqla").0);
    for (variable, path) in libraries {
        command.env(variable, path);
    }
    let ended = Job::start(command).end_within(Duration::from_secs(60));
    Output { status: ended.status, stdout: ended.stdout.into(), stderr: ended.stderr.into() }
}

/// `--device cuda` ends with one line that has all of `says`; `auto` says the same and computes on the CPU.
fn check(libraries: &[(&str, &Path)], says: &[&str]) {
    let program = || Command::new(env!("CARGO_BIN_EXE_gqla"));
    let output = generate(&mut program(), "cuda", libraries);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(7), 1), "{stderr}");
    for part in says {
        assert!(stderr.contains(part), "{part:?} is not in {stderr}");
    }
    let output = generate(&mut program(), "auto", libraries);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !output.stdout.is_empty(), "{stderr}");
    let line = stderr.lines().find(|line| line.contains("computing on the CPU")).unwrap_or_default();
    for part in says {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
}

#[test]
fn a_missing_driver_is_named_with_where_it_was_looked_for_and_what_to_install() {
    let Some(libraries) = Libraries::new() else { return };
    let nowhere = libraries.0.path().join("nowhere");
    let says =
        ["NVIDIA driver (libcuda.so.1) was not found", "$GQLA_CUDA", "LD_LIBRARY_PATH", "install NVIDIA's driver"];
    check(&[("GQLA_CUDA", &nowhere)], &says);
}

#[test]
fn a_driver_that_is_too_old_is_named_with_its_path_and_version() {
    let Some(libraries) = Libraries::new() else { return };
    let old = libraries.add("libcuda.so.1", &DRIVER.replace("cuLaunchKernelEx", "cuLaunchKernel"));
    let path = old.display().to_string();
    let says =
        ["NVIDIA driver", &path, "is too old: it has no cuLaunchKernelEx", "install NVIDIA's driver for CUDA 12.0"];
    check(&[("GQLA_CUDA", &old)], &says);
    let old = libraries.add("libcuda.so.1", &DRIVER.replace("13000", "11080"));
    check(&[("GQLA_CUDA", &old)], &["NVIDIA driver", &path, "is too old: it is for CUDA 11.8", "install"]);
}

#[test]
fn gpus_that_are_too_old_are_named() {
    let Some(libraries) = Libraries::new() else { return };
    let driver = libraries.add("libcuda.so.1", &DRIVER.replace("75 ? 9", "75 ? 7"));
    check(&[("GQLA_CUDA", &driver)], &["stand-in", "compute capability 7.0", "8.0 is the oldest"]);
}

#[test]
fn a_compiler_that_is_too_old_is_named() {
    let Some(libraries) = Libraries::new() else { return };
    let driver = libraries.add("libcuda.so.1", DRIVER);
    let old = libraries.add("libnvrtc.so.13", &NVRTC.replace("*a = 13", "*a = 11"));
    let says = ["NVRTC", "libnvrtc.so.13", "is too old: it is of CUDA 11.0", "pip install nvidia-cuda-nvrtc"];
    check(&[("GQLA_CUDA", &driver), ("GQLA_NVRTC", &old)], &says);
    let old = libraries.add("libnvrtc.so.13", &NVRTC.replace("nvrtcGetPTXSize", "nvrtcGetSize"));
    let says = ["NVRTC", "libnvrtc.so.13", "is too old: it has no nvrtcGetPTXSize", "pip install nvidia-cuda-nvrtc"];
    check(&[("GQLA_CUDA", &driver), ("GQLA_NVRTC", &old)], &says);
}

#[test]
fn a_cublas_that_is_too_old_is_named() {
    let Some(libraries) = Libraries::new() else { return };
    let driver = libraries.add("libcuda.so.1", DRIVER);
    let nvrtc = libraries.add("libnvrtc.so.13", NVRTC);
    let old = libraries.add("libcublasLt.so.13", &CUBLASLT.replace("130000", "111103"));
    let says = ["cuBLASLt", "libcublasLt.so.13", "is too old: it is version 111103", "pip install nvidia-cublas"];
    check(&[("GQLA_CUDA", &driver), ("GQLA_NVRTC", &nvrtc), ("GQLA_CUBLASLT", &old)], &says);
}

#[test]
fn an_nccl_that_is_too_old_sends_several_ranks_to_the_cpu() {
    let Some(libraries) = Libraries::new() else { return };
    let driver = libraries.add("libcuda.so.1", DRIVER);
    let nvrtc = libraries.add("libnvrtc.so.13", NVRTC);
    let cublas = libraries.add("libcublasLt.so.13", CUBLASLT);
    let nccl = libraries.add("libnccl.so.2", NCCL);
    let all: [(&str, &Path); 4] =
        [("GQLA_CUDA", &driver), ("GQLA_NVRTC", &nvrtc), ("GQLA_CUBLASLT", &cublas), ("GQLA_NCCL", &nccl)];
    let mut command = mpirun(2);
    let output = generate(command.arg(env!("CARGO_BIN_EXE_gqla")), "auto", &all);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !output.stdout.is_empty(), "{stderr}");
    let said = "computing on the CPU: NCCL (";
    let line = stderr.lines().find(|line| line.contains(said)).unwrap_or_default();
    assert!(line.contains("is too old: it is version 20909") && line.contains("libnccl2"), "{stderr}");
}
