// The camera at the back, shown in a TextureView, from which frames are taken.

package org.messtf.example

import android.content.Context
import android.graphics.Bitmap
import android.graphics.SurfaceTexture
import android.hardware.camera2.CameraCaptureSession
import android.hardware.camera2.CameraCharacteristics
import android.hardware.camera2.CameraDevice
import android.hardware.camera2.CameraManager
import android.hardware.camera2.params.OutputConfiguration
import android.hardware.camera2.params.SessionConfiguration
import android.view.Surface
import android.view.TextureView
import java.util.concurrent.Executor

class Camera(private val context: Context, private val view: TextureView, private val failed: (String) -> Unit) {
    private val executor: Executor = context.mainExecutor
    private var device: CameraDevice? = null
    private var wanted = false

    /** Asked for by `open`, until `close` or until it failed. */
    val isOn: Boolean
        get() = wanted

    /** Needs the permission. */
    fun open() {
        wanted = true
        if (view.isAvailable) start()
        view.surfaceTextureListener = object : TextureView.SurfaceTextureListener {
            override fun onSurfaceTextureAvailable(surface: SurfaceTexture, width: Int, height: Int) {
                if (wanted) start()
            }

            override fun onSurfaceTextureSizeChanged(surface: SurfaceTexture, width: Int, height: Int) = Unit

            override fun onSurfaceTextureDestroyed(surface: SurfaceTexture): Boolean = true

            override fun onSurfaceTextureUpdated(surface: SurfaceTexture) = Unit
        }
    }

    fun close() {
        wanted = false
        device?.close()
        device = null
    }

    /** The latest frame, upright while the phone is, null before the first. The sensor lies across: width and height change places. */
    fun frame(): Bitmap? = if (device == null) null else view.getBitmap(HEIGHT, WIDTH)

    @Suppress("MissingPermission")
    private fun start() {
        try {
            val manager = context.getSystemService(CameraManager::class.java)
            val back = CameraCharacteristics.LENS_FACING_BACK
            val id = manager.cameraIdList.firstOrNull { manager.getCameraCharacteristics(it).get(CameraCharacteristics.LENS_FACING) == back }
            if (id == null) stop("there is none at the back") else manager.openCamera(id, executor, Opened())
        } catch (error: Exception) { // it may be in use, forbidden by policy, or broken
            stop(error.message ?: error.toString())
        }
    }

    private fun stop(why: String) {
        close()
        failed(why)
    }

    private inner class Opened : CameraDevice.StateCallback() {
        override fun onOpened(camera: CameraDevice) {
            val texture = view.surfaceTexture
            if (!wanted || texture == null) return camera.close()
            device = camera
            texture.setDefaultBufferSize(WIDTH, HEIGHT)
            val surface = Surface(texture)
            val request = camera.createCaptureRequest(CameraDevice.TEMPLATE_PREVIEW)
            request.addTarget(surface)
            val configured = object : CameraCaptureSession.StateCallback() {
                override fun onConfigured(session: CameraCaptureSession) {
                    if (device == camera) session.setRepeatingRequest(request.build(), null, null)
                }

                override fun onConfigureFailed(session: CameraCaptureSession) = stop("it does not give $WIDTH×$HEIGHT pixels")
            }
            val outputs = listOf(OutputConfiguration(surface))
            camera.createCaptureSession(SessionConfiguration(SessionConfiguration.SESSION_REGULAR, outputs, executor, configured))
        }

        override fun onDisconnected(camera: CameraDevice) {
            camera.close()
            stop("another app has taken it")
        }

        override fun onError(camera: CameraDevice, error: Int) {
            camera.close()
            stop("error $error")
        }
    }

    private companion object {
        const val WIDTH = 640
        const val HEIGHT = 480
    }
}
