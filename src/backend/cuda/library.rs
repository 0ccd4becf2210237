//! Finds and opens NVIDIA's libraries at run time: a missing one is an error that says what to install, never a panic.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A library that is opened at run time.
pub(crate) struct Wanted {
    /// Its name for people.
    pub name: &'static str,
    /// File names that are looked for, best first.
    pub files: &'static [&'static str],
    /// Environment variable with the path of the file, or of its directory.
    pub variable: &'static str,
    /// What to install.
    pub package: &'static str,
    /// Beginning of the names of files beside it that it opens by name, and would not find there.
    pub beside: Option<&'static str>,
}

/// The driver.
pub(crate) const DRIVER: Wanted = Wanted {
    name: "NVIDIA driver",
    files: &["libcuda.so.1", "libcuda.so"],
    variable: "GQLA_CUDA",
    package: "NVIDIA's driver for CUDA 12.0 or newer (it brings libcuda.so.1)",
    beside: None,
};
/// The run-time compiler.
pub(crate) const NVRTC: Wanted = Wanted {
    name: "NVRTC",
    files: &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
    variable: "GQLA_NVRTC",
    package: "the CUDA toolkit's NVRTC of 12.0 or newer, or `pip install nvidia-cuda-nvrtc`",
    beside: Some("libnvrtc-builtins.so"),
};
/// Matrix products.
pub(crate) const CUBLASLT: Wanted = Wanted {
    name: "cuBLASLt",
    files: &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
    variable: "GQLA_CUBLASLT",
    package: "the CUDA toolkit's cuBLAS of 12.0 or newer, or `pip install nvidia-cublas`",
    beside: None,
};
/// Collectives.
pub(crate) const NCCL: Wanted = Wanted {
    name: "NCCL",
    files: &["libnccl.so.2", "libnccl.so"],
    variable: "GQLA_NCCL",
    package: "NCCL 2.24 or newer (package libnccl2, or `pip install nvidia-nccl-cu13`)",
    beside: None,
};

/// An open library; it stays open until the process ends.
#[derive(Clone)]
pub(crate) struct Library {
    handle: *mut c_void,
    wanted: &'static Wanted,
    /// The path it was opened by, or its name where the loader knew it.
    found: PathBuf,
}

// SAFETY: the handle of a library that is never closed; dlsym may be called from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// Opens `wanted`: the path in its variable, what the loader knows (LD_LIBRARY_PATH, ldconfig), the toolkit's
/// directories, and wheels of Python environments.
///
/// # Errors
/// [`Error::Device`] naming the library, the places and the package.
pub(crate) fn open(wanted: &'static Wanted) -> Result<Library> {
    let mut failures = vec![];
    for candidate in candidates(wanted) {
        if let (true, Some(prefix), Some(directory)) = (candidate.is_absolute(), wanted.beside, candidate.parent()) {
            for beside in entries(directory, prefix) {
                load(&beside);
            }
        }
        let handle = load(&candidate);
        if !handle.is_null() {
            return Ok(Library { handle, wanted, found: candidate });
        }
        if candidate.is_absolute() {
            failures.push(last_error());
        }
    }
    let places: String = directories().iter().map(|d| format!(", {}", d.display())).collect();
    let found = if failures.is_empty() { String::new() } else { format!("; could not open {}", failures.join("; ")) };
    Err(Error::Device(format!(
        "{} ({}) was not found{found}; looked in ${}, the loader's path (LD_LIBRARY_PATH, ldconfig){places}; \
         install {}",
        wanted.name, wanted.files[0], wanted.variable, wanted.package
    )))
}

fn load(path: &Path) -> *mut c_void {
    let Ok(name) = CString::new(path.as_os_str().as_encoded_bytes()) else { return std::ptr::null_mut() };
    // SAFETY: a C string; loading runs the initialisers of NVIDIA's library, which is what is asked for.
    unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }
}

impl Library {
    /// The address of a function.
    ///
    /// # Errors
    /// [`Error::Device`] when the library is too old to have it.
    pub fn symbol(&self, name: &CStr) -> Result<*mut c_void> {
        // SAFETY: an open library and a C string.
        let address = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if address.is_null() {
            return Err(self.too_old(&format!("it has no {}", name.to_string_lossy())));
        }
        Ok(address)
    }

    /// That the library cannot be used, and `why`.
    pub fn too_old(&self, why: &str) -> Error {
        let Wanted { name, package, .. } = self.wanted;
        Error::Device(format!("{name} ({}) is too old: {why}; install {package}", self.found.display()))
    }
}

/// A table of functions: `functions! { struct Name { field: "symbol" fn(arguments) -> result, … } }`.
macro_rules! functions {
    ($(#[$doc:meta])* $vis:vis struct $table:ident { $($field:ident: $symbol:literal fn($($arg:ty),*) -> $ret:ty,)* }) => {
        $(#[$doc])*
        $vis struct $table { $(pub $field: unsafe extern "C" fn($($arg),*) -> $ret,)* }
        impl $table {
            /// Looks every function up.
            $vis fn load(library: &$crate::backend::cuda::library::Library) -> $crate::error::Result<Self> {
                Ok($table { $($field: {
                    let address = library.symbol($symbol)?;
                    // SAFETY: the library's function of this name has this signature.
                    unsafe { std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($arg),*) -> $ret>(address) }
                },)* })
            }
        }
    };
}
pub(crate) use functions;

fn last_error() -> String {
    // SAFETY: dlerror gives a C string, or null when there was no error.
    unsafe {
        let text: *const c_char = libc::dlerror();
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}

fn candidates(wanted: &Wanted) -> Vec<PathBuf> {
    let mut all = vec![];
    if let Some(path) = std::env::var_os(wanted.variable).map(PathBuf::from) {
        if path.is_dir() {
            all.extend(wanted.files.iter().map(|f| path.join(f)));
        } else {
            all.push(path);
        }
    }
    for file in wanted.files {
        all.push(file.into());
        all.extend(directories().iter().map(|d| d.join(file)).filter(|p| p.exists()));
    }
    all
}

/// Directories beyond the loader's own that may hold NVIDIA's libraries.
fn directories() -> Vec<PathBuf> {
    let mut all = vec![];
    for root in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from) {
        all.extend([root.join("lib64"), root.join("lib")]);
    }
    all.extend(
        ["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib", "/usr/lib/x86_64-linux-gnu"]
            .map(PathBuf::from),
    );
    let mut environments: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    environments.extend(std::env::split_paths(&path).filter_map(|p| p.parent().map(Path::to_path_buf)));
    environments.extend(std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".local")));
    for environment in environments {
        for python in entries(&environment.join("lib"), "python") {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = python.join(packages).join("nvidia");
                all.extend(entries(&nvidia, "").into_iter().map(|d| d.join("lib")));
            }
        }
    }
    all.retain(|d| d.is_dir());
    let mut seen = std::collections::HashSet::new();
    all.retain(|d| seen.insert(d.clone()));
    all
}

/// Entries of a directory whose names begin with `prefix`, sorted.
fn entries(directory: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(read) = std::fs::read_dir(directory) else { return vec![] };
    let mut found: Vec<PathBuf> = read
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort();
    found
}
