//! Starting under `mpirun`, and knowing whether this process was.

use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::error::{Error, Result};

/// This process's place among those that `mpirun` started, as the environment says before MPI is initialised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launched {
    /// Its rank.
    pub rank: usize,
    /// How many processes were started, where the launcher says so.
    pub world: Option<usize>,
}

/// Whether a launcher that MPI understands started this process: Open MPI's `mpirun`, one that speaks PMI (MPICH,
/// Intel), or Slurm's `srun` with PMI or PMIx. Without one MPI is not initialised at all.
pub fn launched() -> Option<Launched> {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    if let Some(world) = number("OMPI_COMM_WORLD_SIZE") {
        return Some(Launched { rank: number("OMPI_COMM_WORLD_RANK").unwrap_or(0), world: Some(world) });
    }
    if let Some(world) = number("PMI_SIZE") {
        return Some(Launched { rank: number("PMI_RANK").unwrap_or(0), world: Some(world) });
    }
    Some(Launched { rank: number("PMIX_RANK")?, world: None })
}

/// `mpirun` for `world` ranks on this host, to which the program and its arguments are to be added.
///
/// Errors: `mpirun` is not in PATH.
pub fn mpirun(world: usize) -> Result<Command> {
    let mut command = Command::new(find_mpirun()?);
    command.arg("-n").arg(world.to_string());
    // More ranks than cores is a supported way to run; and a rank's threads share the host's cores by themselves, so
    // it must not be tied to one of them.
    command.args(["--oversubscribe", "--bind-to", "none"]);
    // All ranks are on this host: shared memory alone, with no search for networks and no warnings about them.
    command.args(["--mca", "pml", "ob1", "--mca", "btl", "self,vader"]);
    // Copies by way of shared memory, because containers often forbid reading another process's memory directly.
    command.args(["--mca", "btl_vader_single_copy_mechanism", "none"]);
    // SAFETY: geteuid has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        command.arg("--allow-run-as-root");
    }
    Ok(command)
}

/// Replaces this process by `mpirun` running it again, with the same arguments, as `world` ranks. Signals sent to
/// this process (ctrl-C too) reach `mpirun`, which passes them on, and its exit status is this process's.
///
/// Returns only with an error: `mpirun` is not in PATH, or this process is already one of its ranks.
pub fn relaunch(world: usize) -> Result<Infallible> {
    if let Some(Launched { rank, .. }) = launched() {
        let what = format!("rank {rank} of an mpirun cannot start another mpirun with {world} ranks");
        return Err(Error::Usage(what));
    }
    let program = std::env::current_exe().map_err(|error| Error::io("/proc/self/exe", error))?;
    let mut command = mpirun(world)?;
    let error = command.arg(program).args(std::env::args_os().skip(1)).exec();
    Err(Error::io(command.get_program(), error))
}

/// As [`relaunch`], but this process stays, so that it can be told to end as one that serves alone: SIGTERM and SIGINT
/// reach rank 0 as SIGUSR1, which `mpirun` passes on, while it answers the others by killing its ranks. Returns
/// `mpirun`'s exit code.
pub fn supervise(world: usize) -> Result<i32> {
    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
    let failed = |error| Error::io("mpirun", error);
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGUSR1]).map_err(failed)?;
    let program = std::env::current_exe().map_err(|error| Error::io("/proc/self/exe", error))?;
    let mut command = mpirun(world)?;
    // A group of its own: ctrl-C reaches this process alone.
    command.arg(program).args(std::env::args_os().skip(1)).process_group(0);
    // SAFETY: prctl is a plain system call, allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        })
    };
    let mut child = command.spawn().map_err(failed)?;
    let mpirun = child.id() as libc::pid_t;
    let (handle, forward) = (signals.handle(), move || {
        for _ in signals.forever() {
            // SAFETY: kill takes plain numbers; the child has not been waited for while this thread runs.
            unsafe { libc::kill(mpirun, libc::SIGUSR1) };
        }
    });
    let forwarder = std::thread::Builder::new().name("gqla-signals".into()).spawn(forward).map_err(failed)?;
    // Waits without reaping: until the forwarder has ended, the number must stay the child's.
    // SAFETY: waitid writes to a value that is there.
    unsafe {
        let mut info = std::mem::zeroed::<libc::siginfo_t>();
        while libc::waitid(libc::P_PID, mpirun as libc::id_t, &mut info, libc::WEXITED | libc::WNOWAIT) != 0
            && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
        {}
    }
    handle.close();
    let _ = forwarder.join();
    let status = child.wait().map_err(failed)?;
    Ok(status.code().unwrap_or_else(|| 128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0)))
}

fn find_mpirun() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join("mpirun")).find(|file| file.is_file()).ok_or_else(|| {
        let remedy = "run launch/demo or launch/test, which install it, or `apt install openmpi-bin libopenmpi-dev`";
        Error::Usage(format!("several ranks need mpirun, and it is not in PATH; {remedy}"))
    })
}
